"""Work and what is measured of it. No test here depends on how fast anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_compiler import measure as timing
from sparsify_compiler.errors import InputError, TargetError
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.target import Target, fingerprint, host
from sparsify_compiler.work import Work, is_dense, measure
from sparsify_compiler.work_sample import forms_of, limit_of, random_mask

LINEAR = {"M": 3, "N": 40, "K": 64}


@pytest.mark.parametrize(("structure", "op", "sizes"), [
    ("16x1", "linear_bsr", {"r": 16, "c": 1, "density": 0.2}), ("2:4", "linear_nm", {"n": 2, "m": 4, "density": 0.5}),
    ("fan_in", "linear_condensed", {"density": 0.05}), ("unstructured", "linear_bitmap", {"density": 0.2}),
    ("unstructured", "linear_csr", {"density": 0.01}), (None, "linear", {}),
])  # fmt: skip
def test_of_a_structure_it_is_the_op_that_pack_would_take(structure: str | None, op: str, sizes: dict[str, float]) -> None:
    made = Work.of((40, 64), 3, None if structure is None else Structure.parse(structure), sizes.get("density", 1.0))
    assert made == Work.make(op, **LINEAR, **sizes)
    assert made.dense == Work.make("linear", **LINEAR)
    if op != "linear":
        conv = {"M": 49, "N": 40, "K": 64, "taps": 1, "read": 3136, "written": 1960}
        assert Work.make(f"conv2d_{op.removeprefix('linear_')}", **conv, **sizes).dense == Work.make("conv2d", **conv)


def test_the_order_of_sizes_does_not_matter() -> None:
    assert Work.make("linear", M=1, N=2, K=3) == Work.make("linear", dtype=torch.float32, K=3, N=2, M=1)  # type: ignore[arg-type]


def test_costs_come_from_the_formulas() -> None:
    work = Work.make("select_ffn", M=1, K=8, hidden=32, N=8, density=0.5)
    assert work.cost.flops < work.dense.cost.flops
    assert Work.make("linear", "bfloat16", **LINEAR).cost.bytes == 2 * (40 * 64 + 3 * 64 + 3 * 40)
    with pytest.raises(InputError, match="the size K is missing"):
        _ = Work.make("linear", M=1, N=2).cost


@pytest.mark.parametrize(("arguments", "said"), [
    ({"op": "linear_bsrr"}, "did you mean linear_bsr"), ({"op": "linear", "dtype": "int8"}, "no kernels compute in 'int8'"),
    ({"op": "linear", "M": -1}, "M is below 0"), ({"op": "linear", "K": float("nan")}, "no number"),
    ({"op": "linear", "between": -1}, "between is below 0"),
])  # fmt: skip
def test_bad_work_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Work.make(**arguments)


@pytest.mark.parametrize("work", [
    Work.make("linear", **LINEAR), Work.make("linear_bsr", **LINEAR, r=4, c=1, density=0.3), Work.make("linear_nm", **LINEAR, n=1, m=4, density=0.25),
    Work.make("linear_condensed", **LINEAR, density=0.2), Work.make("linear_csr", **LINEAR, density=0.0),
    Work.make("linear_bitmap", **LINEAR, density=1.0),
    Work.make("select_linear", **LINEAR, density=0.5), Work.make("select_ffn", M=1, K=64, hidden=48, N=64, density=0.5),
], ids=lambda work: work.op)  # fmt: skip
def test_every_form_computes_the_layer(work: Work) -> None:
    """All forms of linear layers agree where nothing is left out; elsewhere they have the shape."""
    forms, x = forms_of(work, host())
    assert next(iter(forms)) == "dense eager"
    with torch.inference_mode():
        found = {name: form() for name, form in forms.items()}
    assert {value.shape for value in found.values()} == {(x.shape[0], dict(work.sizes)["N"])}  # type: ignore[attr-defined]
    if dict(work.sizes).get("density", 1.0) == 1.0:
        for value in found.values():
            torch.testing.assert_close(value, found["dense eager"], rtol=1e-4, atol=1e-4)


def test_masks_have_the_density_asked_for() -> None:
    condensed = random_mask(Work.make("linear_condensed", M=1, N=30, K=50, density=0.1), 30, 50)
    assert condensed.sum(1).unique().tolist() == [5]
    blocks = random_mask(Work.make("linear_bsr", M=1, N=64, K=400, density=0.25, r=16, c=1), 64, 400)
    assert blocks.view(4, 16, 400).float().mean(1).unique().tolist() == [0.0, 1.0]
    assert abs(float(blocks.float().mean()) - 0.25) < 0.05


def test_limits_are_reached_by_the_share_asked_for() -> None:
    x = torch.arange(1.0, 101).view(2, 50)
    assert int((x >= limit_of(x, 0.3)).sum()) == 30
    assert int((x >= limit_of(x, 0.0)).sum()) == 1
    assert int((x >= limit_of(x, 1.0)).sum()) == 100


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    runs = []

    def interleave(forms: dict[str, Any], **how: Any) -> dict[str, timing.Timing]:
        how["before"](forms["dense eager"])
        runs.append(list(forms))
        return {name: timing.Timing(2.0, 1.0, 3.0) for name in forms}

    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(timing, "waited", lambda: 0.0)
    work = Work.make("linear", **LINEAR, between=1 << 12)
    first, again = measure(work), measure(work)
    assert first == again == dict.fromkeys(runs[0], 2e-3)
    assert len(runs) == 1
    assert all(is_dense(name) for name in first)
    measure(Work.make("linear", **LINEAR, between=0))
    assert len(runs) == 2


def test_it_is_measured_again_when_other_programs_were_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    waits, times = iter([0.0, 5.0, 5.0, 5.0]), iter([9.0, 2.0])  # the first time five seconds, the second time none
    monkeypatch.setattr(timing, "waited", lambda: next(waits))

    def interleave(forms: dict[str, Any], **how: Any) -> dict[str, timing.Timing]:
        taken = next(times)
        return {name: timing.Timing(taken, taken, taken) for name in forms}

    monkeypatch.setattr(timing, "interleave", interleave)
    assert set(measure(Work.make("linear", **LINEAR, between=0)).values()) == {2e-3}


def test_waiting_is_told_and_never_falls() -> None:
    first = timing.waited()
    assert 0 <= first <= timing.waited()


def test_what_cannot_be_measured_says_so() -> None:
    with pytest.raises(InputError, match="top_pages cannot be made up"):
        measure(Work.make("top_pages", M=1, N=8, K=8))
    with pytest.raises(InputError, match="the size 'read' of attend_blocks is missing"):
        measure(Work.make("attend_blocks", M=8, K=64, E=64, block_q=1, block_k=64, pairs=8))
    with pytest.raises(TargetError, match="is not this machine"):
        measure(Work.make("linear", **LINEAR), Target("board", "aarch64", "generic", ("neon",), 4))


def test_the_fingerprint_says_what_the_machine_is() -> None:
    assert str(host().cores) in fingerprint().split()
    assert set(host().features) <= set(fingerprint().split())
