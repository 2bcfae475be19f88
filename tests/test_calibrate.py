"""Calibration: right numbers, bounded memory, few runs, a cache that never harms, and refusals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.calibrate import Calibration, calibrate, quantile
from sparsify_compiler.calibrate_cache import fingerprint
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, InputError, UnknownNameError
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

EVERY = frozenset({"input_norm", "input_mean", "absmax", "gram", "quantiles", "samples"})


class Net(nn.Module):
    """Two layers that read the same input, a third behind them, a convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 6)
        self.conv = nn.Conv2d(3, 4, 3, groups=1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(self.q(x) * self.k(x)), self.conv(image)


def program_of(seed: int = 0) -> tuple[Program, Net]:
    torch.manual_seed(seed)
    model = Net().eval()
    return capture(model, (torch.randn(2, 5, 8), torch.randn(1, 3, 6, 6))), model


def batches_of(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    rand = torch.Generator().manual_seed(7)
    return [(torch.randn(2, 5, 8, generator=rand), torch.randn(1, 3, 6, 6, generator=rand)) for _ in range(count)]


def gather(program: Program, batches: Any, needs: Mapping[str, frozenset[str]], **options: Any) -> Calibration:
    return calibrate(program, batches, needs, **{"cache": False, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "cache"
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)


def test_numbers() -> None:
    program, model = program_of()
    batches = batches_of()
    found = gather(program, batches, {"q": EVERY, "k": EVERY, "out": EVERY, "conv": EVERY - {"gram"}})
    x = torch.cat([b[0].reshape(-1, 8) for b in batches])
    image = torch.cat([b[1].movedim(1, -1).reshape(-1, 3) for b in batches])
    with torch.no_grad():
        inner = model.q(x) * model.k(x)
    for site, rows in {"q": x, "k": x, "out": inner, "conv": image}.items():
        torch.testing.assert_close(found.get(site, "input_norm"), rows.norm(dim=0))
        torch.testing.assert_close(found.get(site, "input_mean"), rows.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.get(site, "absmax"), rows.abs().amax(0))
        assert int(found.get(site, "samples")) == rows.shape[0]
        sketch = found.get(site, "quantiles")
        for share in (0.1, 0.5, 0.9, 1.0):
            exact = float(torch.quantile(rows.abs().reshape(-1), share, interpolation="lower"))
            assert quantile(sketch, share) == pytest.approx(exact, rel=0.03)
        if site != "conv":
            torch.testing.assert_close(found.get(site, "gram"), rows.T @ rows)
    assert found.runs == 1


@pytest.mark.parametrize("kind", ["tuples", "dicts", "generator", "endless keyword order"])
def test_batches_in_every_form(kind: str) -> None:
    program, _ = program_of()
    batches: Any = batches_of()
    if kind == "dicts":
        batches = [{"x": x, "image": i} for x, i in batches]
    elif kind == "generator":
        batches = (b for b in batches)
    elif kind == "endless keyword order":
        batches = [{"image": i, "x": x} for x, i in batches]
    found = gather(program, batches, {"out": frozenset({"input_norm"})})
    plain = gather(program, batches_of(), {"out": frozenset({"input_norm"})})
    torch.testing.assert_close(found.get("out", "input_norm"), plain.get("out", "input_norm"))


def test_statistics_are_of_the_program_as_it_is_now() -> None:
    program, _ = program_of()
    masked = Pipeline((MaskWeights(targets=("q",)),)).run(program, Context(density=0.1), ())
    needs = {"out": frozenset({"input_norm"})}
    before, after = (gather(p, batches_of(), needs).get("out", "input_norm") for p in (program, masked))
    assert not torch.allclose(before, after)


def test_memory_is_bounded_by_groups_on_demand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(5))).eval()
    x = torch.randn(4, 600)
    program = capture(model, (x,))
    needs = {str(i): frozenset({"gram", "input_norm"}) for i in range(5)}
    size = 600 * 600 * 4
    found = gather(program, (batch for batch in [(x,)]), needs, max_bytes=2 * size + 100)
    assert found.runs == 1
    whole = gather(program, [(x,)], needs)
    for i in range(5):
        torch.testing.assert_close(found.get(str(i), "gram"), whole.get(str(i), "gram"))
        found.get("0", "input_norm")
        assert sum(t.numel() * t.element_size() for r in found._results.values() for t in r.values()) <= 2 * size + 5 * 600 * 4
    assert (found.runs, whole.runs) == (4, 1)
    with pytest.raises(CalibrationError, match="bytes"):
        gather(program, [(x,)], needs, max_bytes=size - 1)
    with pytest.raises(CalibrationError, match="walked"):
        gather(program, (batch for batch in [(x,)] * 3), needs, max_bytes=x.numel() * 8)


def test_the_cache_spares_the_run_and_depends_on_content(folder: Path) -> None:
    program, _ = program_of()
    needs = {"q": frozenset({"input_norm"}), "out": frozenset({"gram"})}
    first = gather(program, batches_of(), needs, cache=folder)
    again = gather(program_of()[0], batches_of(), needs, cache=folder)
    assert (first.runs, again.runs) == (1, 0)
    for site, names in needs.items():
        for name in names:
            assert torch.equal(first.get(site, name), again.get(site, name))
    other_model = gather(program_of(1)[0], batches_of(), needs, cache=folder)
    other_batches = gather(program, batches_of(2), needs, cache=folder)
    other_statistics = gather(program, batches_of(), {"q": frozenset({"absmax"})}, cache=folder)
    masked = Pipeline((MaskWeights(targets=("q",)),)).run(program, Context(density=0.5), ())
    other_graph = gather(masked, batches_of(), needs, cache=folder)
    assert [c.runs for c in (other_model, other_batches, other_statistics, other_graph)] == [1, 1, 1, 1]


def test_some_of_what_is_known_spares_the_run(folder: Path) -> None:
    program, _ = program_of()
    needs = {"q": frozenset({"input_norm", "gram"}), "out": frozenset({"gram"})}
    first = gather(program, batches_of(), needs, cache=folder)
    gather(program, batches_of(), {"conv": frozenset({"absmax"})}, cache=folder)
    some = gather(program, batches_of(), {"out": frozenset({"gram"}), "conv": frozenset({"absmax"})}, cache=folder)
    assert some.runs == 0
    assert torch.equal(some.get("out", "gram"), first.get("out", "gram"))
    assert gather(program, batches_of(), {"out": frozenset({"gram", "absmax"})}, cache=folder).runs == 1
    assert gather(program_of(1)[0], batches_of(), {"out": frozenset({"gram"})}, cache=folder).runs == 1


def test_another_budget_does_not_recalibrate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(folder))
    program, _ = program_of()
    runs = []

    def calibrated(now: Program, needs: Mapping[str, frozenset[str]]) -> Calibration:
        result = calibrate(now, batches_of(), needs)
        runs.append(result.runs)
        return result

    for density in (0.5, 0.3, 0.7):
        ctx = Context(density=density, calibrate=calibrated)
        made = Pipeline((MaskWeights("weight_times_input_norm", "row"),)).run(program, ctx, ())
        assert made.decisions["q"].density == pytest.approx(density, abs=0.1)
    assert runs == [1, 0, 0]
    assert (folder / "calibration").is_dir()


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "missing"])
def test_a_damaged_entry_is_gathered_again(folder: Path, damage: str) -> None:
    program, _ = program_of()
    needs = {"q": frozenset({"input_norm"})}
    expected = gather(program, batches_of(), needs, cache=folder).get("q", "input_norm")
    file = next(folder.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 255
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "manifest":
        file.with_name("manifest.json").write_text("{")
    else:
        file.unlink()
    again = gather(program, batches_of(), needs, cache=folder)
    assert again.runs == 1
    assert torch.equal(again.get("q", "input_norm"), expected)
    assert gather(program, batches_of(), needs, cache=folder).runs == 0


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = program_of()
    needs = {"q": frozenset({"input_norm"})}
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for cache in (blocked, blocked / "below"):
        heard: list[str] = []
        assert gather(program, batches_of(), needs, cache=cache, warn=heard.append).runs == 1
        assert "cache cannot be used" in heard[0]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsify_compiler.calibrate_cache.write_safetensors", full)
    heard = []
    assert gather(program, batches_of(), needs, cache=tmp_path / "full", warn=heard.append).runs == 1
    assert "No space left" in heard[0]
    if os.geteuid() != 0:
        tmp_path.chmod(0o555)
        assert gather(program, batches_of(), needs, cache=tmp_path / "new", warn=heard.append).runs == 1


def test_old_results_are_trimmed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = program_of()
    for count in (1, 2, 3):
        gather(program, batches_of(count), {"q": frozenset({"input_norm"})}, cache=folder)
        size = sum(file.stat().st_size for file in next(folder.iterdir()).iterdir())
        monkeypatch.setattr("sparsify_compiler.calibrate_cache.KEPT_BYTES", 2.5 * size)
    assert len(list(folder.iterdir())) == 2
    assert gather(program, batches_of(3), {"q": frozenset({"input_norm"})}, cache=folder).runs == 0


@pytest.mark.parametrize(("batches", "error", "words"), [
    ([], CalibrationError, "no batch"), (iter(()), CalibrationError, "no batch"), (None, InputError, "iterable of batches"),
    (torch.ones(2, 5, 8), InputError, "iterable of batches"), ({"x": torch.ones(1)}, InputError, "iterable of batches"),
    ("abc", InputError, "iterable"),
    ([torch.ones(2, 5, 8)], InputError, "a batch is a tuple"), ([[torch.ones(2, 5, 8)]], InputError, "a batch is a tuple"),
    ([(torch.ones(2, 5, 8),)], InputError, "batch 0"), ([*batches_of(1), (torch.ones(2, 5, 9), torch.ones(1, 3, 6, 6))], InputError, "batch 1"),
])
def test_wrong_batches(batches: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gather(program_of()[0], batches, {"q": frozenset({"input_norm"})})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(bad: float) -> None:
    batches = batches_of()
    batches[1][0][0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"^q: .*NaN or infinite"):
        gather(program_of()[0], batches, {"q": frozenset({"input_norm"}), "k": frozenset({"absmax"})})


def test_unknown_names() -> None:
    program, _ = program_of()
    with pytest.raises(UnknownNameError, match="gramm"):
        gather(program, batches_of(), {"q": frozenset({"gramm"})})
    with pytest.raises(CalibrationError, match="nowhere"):
        gather(program, batches_of(), {"nowhere": frozenset({"gram"})})
    with pytest.raises(CalibrationError, match="linear layers only"):
        gather(program, batches_of(), {"conv": frozenset({"gram"})})
    with pytest.raises(CalibrationError, match="not gathered"):
        gather(program, batches_of(), {"q": frozenset({"gram"})}).get("q", "absmax")
    assert gather(program, batches_of(), {}).runs == 0


def test_progress_and_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4).bfloat16().eval()
    x = torch.randn(3, 8).bfloat16()
    seen: list[tuple[str, int, int]] = []
    found = gather(capture(model, (x,)), [(x,), (x,)], {_only(model, x): EVERY}, progress=lambda *a: seen.append(a))
    assert seen == [("calibrate", 1, 2), ("calibrate", 2, 2)]
    torch.testing.assert_close(found.get(_only(model, x), "gram"), 2 * x.float().T @ x.float())


def _only(model: nn.Module, x: Tensor) -> str:
    from sparsify_compiler.sites import find_sites

    return find_sites(capture(model, (x,)), ("linear",))[0].path


def test_fingerprint_sees_every_tensor_and_is_fast() -> None:
    program, model = program_of()
    one = fingerprint(program, batches_of())
    assert one == fingerprint(program, batches_of())
    with torch.no_grad():
        model.conv.bias[0] += 1e-3
    assert one != fingerprint(program, batches_of())


class Branch(nn.Module):
    """Python control flow on data: each part is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) if float(x.sum()) > 0 else y


def test_regions_and_sites_that_no_input_reaches(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.ones(2, 4)
    program = capture(Branch().eval(), (x,))
    assert set(program.regions) == {"one", "two"}
    needs = {"one.0": frozenset({"input_norm"}), "two.0": frozenset({"input_norm"})}
    for runs in (1, 0):
        found = gather(program, [(-2 * x,)], needs, cache=folder)
        assert found.runs == runs
        torch.testing.assert_close(found.get("one.0", "input_norm"), 2 * x.norm(dim=0))
        with pytest.raises(CalibrationError, match="no input reached"):
            found.get("two.0", "input_norm")
    reached = gather(program, [(x,)], needs, cache=folder)
    assert reached.get("two.0", "input_norm").shape == (4,)
