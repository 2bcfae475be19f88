"""Experts on disk: the bound on those in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError
from sparsify_compiler.resident_experts import WINDOW, Bounded, ResidentExperts
from sparsify_compiler.target import host

EXPERTS, WIDTH, HIDDEN = 8, 64, 512
ONE = 3 * WIDTH * HIDDEN * 4


class Counted(ResidentExperts):
    """Of experts of one page each, without any memory."""

    def size(self, mixture: int, expert: int) -> int:
        return 10 + expert % 3

    def _drop(self, one: tuple[int, int]) -> None:
        self.bytes -= self._held.pop(one)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 7), min_size=1)), max_size=12), st.integers(12, 60))
def test_the_bound_holds_in_every_turn_and_all_experts_get_one(calls: list[tuple[int, set[int]]], bound: int) -> None:
    resident = Counted(bound)
    for mixture, experts in calls:
        seen: list[int] = []
        for part in resident.turns(mixture, experts):
            assert all((mixture, expert) in resident._held for expert in part)
            assert resident.bytes == sum(resident._held.values()) <= bound
            seen += part
        assert sorted(seen) == sorted(experts)


def test_who_was_used_last_stays() -> None:
    resident = Counted(33)  # three of ten to twelve bytes
    for experts in ([0], [3], [6], [0], [1]):
        list(resident.turns(0, experts))
    assert list(resident._held) == [(0, 6), (0, 0), (0, 1)]
    assert resident.reads == {"from disk": 4, "in memory": 1}
    list(resident.turns(1, [0]))
    assert list(resident._held) == [(0, 0), (0, 1), (1, 0)]
    with pytest.raises(InputError, match="more than the 5"):
        list(Counted(5).turns(0, [0]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, Any, torch.Tensor]:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
                                             num_key_value_heads=2, num_local_experts=EXPERTS)).eval()
    prompt = torch.randint(1, 64, (1, 9))
    place = tmp_path_factory.mktemp("experts") / "saved"
    sc.compile(model, {"input_ids": prompt}, recipe=sc.Pipeline.parse("lower(margin=-1000.0, rounds=3)"),
               dynamic={"input_ids": {0: "batch", 1: "tokens"}}).save(place)
    return place, model, prompt


def pages_of(place: Path) -> int:
    """Bytes of the weights' file that this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            ours = str(place.resolve()) in line
        elif ours and first == "Rss:":
            total += int(rest[0]) << 10
    return total


@pytest.mark.skipif(not host().has("avx512f"), reason="the kernel needs AVX-512")
@pytest.mark.parametrize("experts", [3, 16])
def test_a_model_under_the_bound_writes_what_it_writes_without(saved: tuple[Path, Any, torch.Tensor], experts: int) -> None:
    place, model, prompt = saved
    bound = experts * (ONE + 6 * WINDOW)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(prompt, **options)
    loaded = sc.load(place, model=model, mapped=True, experts_bytes=bound)
    resident = loaded.resident_experts
    assert resident is not None
    assert torch.equal(loaded.generate(prompt, **options), wanted)
    torch.testing.assert_close(loaded(input_ids=prompt).logits, model(input_ids=prompt).logits, atol=1e-4, rtol=1e-3)
    assert 0 < resident.bytes <= bound
    assert resident.bytes == sum(resident._held.values())
    assert resident.reads["from disk"] >= min(experts, 8)
    assert (resident.reads["from disk"] > 2 * EXPERTS) == (experts == 3)  # none is read twice where all fit
    if Path("/proc/self/smaps").exists() and experts == 3:
        assert pages_of(place) < bound + (1 << 20)  # and the other weights, which are 0.2 MB, and what the system maps around a page
    loaded.save(place.parent / f"again{experts}")
    assert torch.equal(sc.load(place.parent / f"again{experts}", model=model).generate(prompt, **options), wanted)


def test_a_bound_that_cannot_be_held_is_refused(saved: tuple[Path, Any, torch.Tensor], tmp_path: Path) -> None:
    place, model, _ = saved
    with pytest.raises(InputError, match="stay on disk"):
        sc.load(place, model=model, experts_bytes=1 << 30)
    if host().has("avx512f"):
        with pytest.raises(InputError, match="one expert has"):
            sc.load(place, model=model, mapped=True, experts_bytes=ONE // 2)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
    sc.compile(plain, (torch.randn(2, 8),), recipe=sc.Pipeline.parse("lower()"), target="cpu").save(tmp_path / "plain")
    with pytest.raises(InputError, match="no mixture"):
        sc.load(tmp_path / "plain", mapped=True, experts_bytes=1 << 30)


def test_memory_that_is_no_files_is_never_dropped() -> None:
    from sparsify_compiler.resident_experts import _on_disk

    class Kernel:
        def state(self) -> dict[str, torch.Tensor]:
            return {name: torch.zeros(2, 64, 64, dtype=torch.float32) for name in ("gate", "down")}

    assert not _on_disk(Kernel(), 1 << 20)


def test_a_copy_of_what_the_file_holds_is_never_dropped() -> None:
    from sparsify_compiler.resident_experts import _on_disk

    weight = torch.zeros(2, 64, 64, dtype=torch.float32)

    class Kernel:
        def __init__(self, read: torch.Tensor) -> None:
            self.read = read

        def state(self) -> dict[str, torch.Tensor]:
            return {"gate": weight, "prepared.gate": self.read}

    size = weight.untyped_storage().nbytes()
    assert [found is weight for found in _on_disk(Kernel(weight), size)] == [True]
    assert not _on_disk(Kernel(weight.clone()), size)


def test_experts_in_memory_come_first_so_that_none_of_them_is_read_again() -> None:
    resident = Counted(20)  # two of ten bytes
    list(resident.turns(0, [6]))
    assert list(resident.turns(0, [0, 3, 6])) == [[6, 0], [3]]
    assert resident.reads == {"from disk": 3, "in memory": 1}


def test_what_is_no_expert_takes_no_memory() -> None:
    resident = Counted(60)
    bounded = Bounded(lambda x, chosen, weights: x, 0, resident, EXPERTS)
    x = torch.randn(1, 4)
    assert torch.equal(bounded(x, torch.tensor([[-1, EXPERTS]])), x)
    assert resident.reads == {"from disk": 0, "in memory": 0}
