"""Weights in huge pages: equal, next to each other, and their room is given back."""

from __future__ import annotations

import gc
import mmap
import threading

import pytest
import torch

from sparsify_compiler import pages

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")


@pytest.fixture(autouse=True)
def own_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_rooms", type(pages._rooms)())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_a_copy_is_equal_and_contiguous(dtype: torch.dtype) -> None:
    tensor = (torch.randn(300, 701) * 100).to(dtype)
    for given in (tensor, tensor.t(), tensor[:, ::2]):
        made = pages.resident(given)
        assert made.is_contiguous()
        assert torch.equal(made, given)
        assert made.data_ptr() != given.data_ptr()
        assert made.data_ptr() % pages.ALIGNED == 0
        assert made.untyped_storage().nbytes() == made.numel() * made.element_size(), "what is counted as held is the weight's own size"
        assert pages.resident(made).data_ptr() == made.data_ptr(), "it is there already"


def test_small_ones_stay() -> None:
    tensor = torch.randn(8)
    assert pages.resident(tensor).data_ptr() == tensor.data_ptr()


def test_without_huge_pages_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1 << 18)
    monkeypatch.setattr(pages, "_ADVICE", 12345)  # the system refuses what it does not know
    assert pages.resident(tensor).data_ptr() == tensor.data_ptr()
    monkeypatch.setattr(pages, "_ADVICE", None)
    assert pages.resident(tensor).data_ptr() == tensor.data_ptr()


def test_places_are_taken_again() -> None:
    made = [pages.resident(torch.full((100_000,), float(n))) for n in range(5)]
    (room,) = pages._rooms
    addresses = [tensor.data_ptr() for tensor in made]
    assert len({*addresses}) == 5
    del made[1:4]
    gc.collect()
    again = pages.resident(torch.full((290_000,), 7.0))
    assert again.data_ptr() == addresses[1], "neighbours that are free are one"
    assert len(room.free) == 2
    assert float(made[0].max()) == 0.0
    assert float(made[1].min()) == 4.0
    del made, again
    gc.collect()
    room.tidy()
    assert len(room.free) == 1


def test_a_room_ends_with_its_last_weight() -> None:
    made = pages.resident(torch.randn(1 << 18))
    view = made[3:]
    del made
    gc.collect()
    assert len(pages._rooms) == 1, "a view holds it"
    del view
    gc.collect()
    assert len(pages._rooms) == 0


def test_large_ones_have_a_room_of_their_own() -> None:
    made = pages.resident(torch.ones(pages.ROOM // 4 + 5))
    assert bool((made == 1).all())


def test_from_many_threads() -> None:
    def work(n: int) -> None:
        for size in range(20_000, 40_000, 1000):
            made = pages.resident(torch.full((size,), float(n)))
            wrong.extend([n] if not bool((made == n).all()) else [])

    wrong: list[int] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
