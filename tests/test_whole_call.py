"""Calls of a model by one library: it says what its kernels say one by one, takes the calls that it was made for, and is kept where it is faster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.misaligned import misalign
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import library_here, whole_call, whole_choice
from sparsify_compiler.capture import capture
from sparsify_compiler.capture_verify import close
from sparsify_compiler.codegen import whole_graph_here
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import InputError, ModelError
from sparsify_compiler.export_library_products import Products
from sparsify_compiler.measure import Timing
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.target import host
from sparsify_compiler.whole_call import rows_of

WORDS = 50
SPARSE = "mask_weights(structure='4x1', density=0.5) | pack() | lower(margin=-1000.0, rounds=1)"


class Encoder(nn.Module):
    """Words, a layer of attention, an FFN, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, 32), nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.words(ids)
        query, key, value = (layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return {"tokens": x, "text": x.mean(1)}


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, WORDS, (batch, tokens), generator=torch.Generator().manual_seed(batch + tokens))


def compiled(model: nn.Module, example: Any, **options: Any) -> CompiledModel:
    return sc.compile(model.eval(), example, recipe=Pipeline.parse(SPARSE), **options)


@pytest.fixture(scope="module")
def encoder() -> CompiledModel:
    """Called by its library, which was asked for, and is taken for faster."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_choice, "_is_faster", lambda times: True)
        return compiled(Encoder(), (ids(4, 12),), dynamic={"ids": {0: "batch", 1: "tokens"}}, calls="library")


def taken(model: CompiledModel) -> int:
    assert model.whole is not None
    return model.whole.calls


def check(model: CompiledModel, given: Tensor, by_library: bool) -> None:
    before = taken(model)
    found = model(given)
    assert taken(model) - before == by_library
    expected = model.flat(given)
    assert list(found) == ["tokens", "text"]
    assert all(close(a, b) for a, b in zip(expected, found.values(), strict=True))


@pytest.mark.parametrize(("batch", "tokens"), [(4, 12), (1, 1), (3, 7), (2, 12)])
def test_a_library_says_what_the_kernels_say(encoder: CompiledModel, batch: int, tokens: int) -> None:
    check(encoder, ids(batch, tokens), True)
    assert encoder.report().calls.startswith("one library")


def test_larger_calls_go_the_usual_way(encoder: CompiledModel) -> None:
    for batch, tokens in ((5, 12), (4, 13), (5, 1)):
        check(encoder, ids(batch, tokens), False)


def test_tensors_may_lie_anyhow(encoder: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library reads them contiguous, wherever they start."""
    assert encoder.whole is not None
    run, read = encoder.whole.library.run, []

    def noted(*inputs: Tensor) -> tuple[Tensor, ...]:
        read.extend(inputs)
        return run(*inputs)

    monkeypatch.setattr(encoder.whole.library, "run", noted)
    turned, shifted = ids(12, 4).t(), torch.zeros(49, dtype=torch.int64)[1:].view(4, 12)
    assert shifted.data_ptr() % 64
    assert not turned.is_contiguous()
    shifted.copy_(ids(4, 12))
    check(encoder, turned, True)
    check(encoder, shifted, True)
    assert all(one.is_contiguous() for one in read)
    assert read[-1].data_ptr() == shifted.data_ptr()


def test_results_are_tensors_of_their_own(encoder: CompiledModel) -> None:
    first = encoder(ids(4, 12))["tokens"]
    kept = first.clone()
    encoder(ids(4, 12).flip(0))
    assert torch.equal(first, kept)


def test_words_that_there_are_none_of_are_refused_as_ever(encoder: CompiledModel) -> None:
    before = taken(encoder)
    for wrong in (WORDS, -1):
        with pytest.raises(IndexError):
            encoder(torch.full((4, 12), wrong))
    assert taken(encoder) == before


def test_another_thread_is_not_waited_for(encoder: CompiledModel) -> None:
    assert encoder.whole is not None
    with encoder.whole._lock:
        check(encoder, ids(4, 12), False)
    check(encoder, ids(4, 12), True)


def test_autocast_goes_the_usual_way() -> None:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_choice, "_is_faster", lambda times: True)
        patch.setattr(whole_choice, "ROOM", 0.1)
        model = compiled(convolutions(), (torch.randn(1, 3, 16, 16),), calls="library")
    x, before = torch.randn(1, 3, 16, 16), taken(model)
    expected = model.flat(x)[0]
    assert close(expected, model(x))
    assert taken(model) == before + 1
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert taken(model) == before + 1
    with pytest.raises(ModelError, match="no gradients"):
        model(x.clone().requires_grad_()).sum().backward()
    assert taken(model) == before + 2
    with torch.no_grad():
        assert close(expected, model(x.clone().requires_grad_()))
        assert taken(model) == before + 3


def test_it_is_saved_and_loaded(encoder: CompiledModel, tmp_path: Path) -> None:
    encoder.save(tmp_path / "saved")
    for rebuild in (False, True):
        loaded = sc.load(tmp_path / "saved", rebuild=rebuild)
        check(loaded, ids(3, 5), True)
        check(loaded, ids(5, 12), False)
        assert loaded.report().calls == encoder.report().calls
        assert loaded.whole is not None
        assert encoder.whole is not None
        assert loaded.whole.library.own_bytes == encoder.whole.library.own_bytes


def test_torch_compile_and_copies_see_the_graph(encoder: CompiledModel) -> None:
    from copy import deepcopy

    check(deepcopy(encoder), ids(4, 12), True)
    before = taken(encoder)
    exported = torch.export.export(encoder, (ids(4, 12),)).module()
    assert taken(encoder) == before
    assert close(encoder(ids(4, 12))["tokens"], exported(ids(4, 12))["tokens"])


def test_what_is_slower_or_wrong_or_large_is_not_kept(encoder: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder.target is not None

    def told(room: int | None = None) -> str:
        choice = whole_choice.choose_call(encoder, (ids(4, 12),), encoder.target, room)
        assert choice.whole is None
        return choice.told

    with monkeypatch.context() as patch:
        patch.setattr(whole_choice, "interleave", lambda forms, **_: dict(zip(forms, (Timing(1.0, 1.0, 1.0), Timing(1.5, 1.5, 1.5)), strict=True)))
        assert told() == "kernel by kernel: a call takes 1.00 ms, and 1.50 ms by one library"
    with monkeypatch.context() as patch:
        patch.setattr(whole_choice.WholeCall, "__call__", lambda self, inputs: tuple(1.01 * one for one in encoder.flat(*inputs)))
        assert "something else" in told()
    with monkeypatch.context() as patch:
        patch.setattr(whole_choice.WholeCall, "__call__", lambda self, inputs: None)
        assert "none that a library takes" in told()
    assert "for itself" in told(-1)
    with monkeypatch.context() as patch:
        patch.setattr(whole_choice, "build_call", lambda *_: {}["nothing"])
        assert "cannot be made: KeyError" in told()


def test_the_smallest_sizes_are_timed_too(encoder: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library is slower for them, it takes calls of the example's sizes alone."""
    answers = iter((True, False))
    monkeypatch.setattr(whole_choice, "_is_faster", lambda times: next(answers, True))
    assert encoder.target is not None
    whole = whole_choice.choose_call(encoder, (ids(4, 12),), encoder.target).whole
    assert whole is not None
    assert whole.sizes == {"batch": (4, 4), "tokens": (12, 12)}
    assert encoder.whole is not None
    assert encoder.whole.sizes == {"batch": (1, 4), "tokens": (1, 12)}


def test_it_is_tried_where_it_is_asked_for_or_worth_it(encoder: CompiledModel) -> None:
    program, large = encoder.program, whole_choice.WORTH
    assert whole_choice.is_wanted("library", program, 0)
    assert whole_choice.is_wanted("auto", program, large)
    assert not whole_choice.is_wanted("auto", program, large - 1)
    assert not whole_choice.is_wanted("parts", program, large)
    plain = capture(nn.Linear(4, 4).eval(), (torch.randn(1, 4),))
    assert not whole_choice.is_wanted("library", plain, large)
    with pytest.raises(InputError, match="calls is auto"):
        compiled(nn.Linear(4, 4), (torch.randn(1, 4),), calls="librar")


def test_equal_graphs_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols have another name in each capture."""
    told: list[str] = []

    def library(function: Any, text: str, target: Any) -> Any:
        told.append(text)
        raise ModelError("not here")

    monkeypatch.setattr(whole_graph_here, "library", library)
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        assert compiled(model, (torch.randn(4, 16),), dynamic={"input": {0: "batch"}}, calls="library").whole is None
    assert told[0] == told[1]
    assert "size0" in told[0]


def test_no_c_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CC", "there-is-no-such-compiler")
    monkeypatch.setattr(whole_graph_here.cache, "read_or_build", lambda key, made: made())
    monkeypatch.setattr(whole_choice, "_is_faster", lambda times: True)
    monkeypatch.setattr(whole_choice, "ROOM", 0.1)
    model = compiled(nn.Sequential(nn.Linear(16, 32), nn.ReLU()), (torch.randn(4, 16),), calls="library")
    assert model.report().calls.startswith("one library"), model.report().calls


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.words(ids + 1)
        return out


class Counted(Shifted):
    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.words(ids.ne(0).int().cumsum(1)) + self.words(ids)
        return out


def test_rows_that_a_call_names_are_known() -> None:
    assert rows_of(capture(Counted().eval(), (ids(2, 5),)).regions[""]) == {0: WORDS}
    with pytest.raises(ModelError, match="which rows of a table"):
        rows_of(capture(Shifted().eval(), (ids(2, 5),)).regions[""])


def test_convolutions_are_cut_as_they_were_measured() -> None:
    """As the kernel over planes that they have for this target; by a rule where they have none."""
    model = compiled(nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU()), (torch.randn(1, 16, 28, 28),), calls="parts")
    assert model.target is not None
    region = model.program.regions[""]
    node = next(node for node in region.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    measured = {"layout": "planes", "r": 4, "vectors": 4, "chunk": 16, "parallel": False}

    def cut(kernel: Any) -> tuple[int, int]:
        node.meta["kernel"] = kernel
        schedule: Any = next(iter(Products(region, model.target or host()).found.values())).laid.schedule  # type: ignore[union-attr]
        return schedule.r, schedule.parallel

    assert cut(SimpleNamespace(options=measured, target=model.target)) == (4, False)
    assert cut(SimpleNamespace(options=measured, target=None))[0] == cut(None)[0] == 8


def test_places_are_told_by_what_is_in_them(encoder: CompiledModel) -> None:
    """Weights are those that the model holds: of its own the library has less than a tenth."""
    assert encoder.whole is not None
    every = sum(tensor.numel() * tensor.element_size() for _, tensor in encoder.whole.library.parameters)
    assert encoder.whole.library.own_bytes * 10 < every
    assert library_here.LibraryHere is type(encoder.whole.library)


def test_weights_that_start_anywhere_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a mapped safetensors file start wherever its header ends: operators that loaded whole lines of them ended the process."""
    monkeypatch.setattr(whole_choice, "_is_faster", lambda times: True)
    torch.manual_seed(0)
    model = misalign(Encoder())
    made = compiled(model, (ids(4, 12),), dynamic={"ids": {0: "batch", 1: "tokens"}}, calls="library")
    assert made.whole is not None, made.report().calls
    words = [one for _, one in made.whole.library.parameters if one.shape == (WORDS, 32)]
    assert [one.data_ptr() for one in words] == [model.words.weight.data_ptr()]
    assert words[0].data_ptr() % 64 == 24
    assert made.whole.library.own_bytes < WORDS * 32 * 4
    check(made, ids(4, 12), by_library=True)


class Odd(nn.Module):
    """A linear layer, and beside it whatever a function makes of the inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(16, 16), function
        self.register_buffer("table", torch.ones(3, 16))

    def forward(self, x: Tensor, whole: Tensor) -> Any:
        return self.layer(x), self.function(self, x, whole)


WHOLE = torch.arange(4) + 1


@pytest.mark.parametrize("function", [lambda m, x, n: n // n.flip(0), lambda m, x, n: n % n.flip(0), lambda m, x, n: torch.fmod(n, n.flip(0)),
                                      lambda m, x, n: torch.div(n, n.flip(0), rounding_mode="trunc")])
def test_whole_numbers_are_not_divided_by_any_that_may_be_zero(function: Any) -> None:
    """Such a quotient ends the process; in torch it is an error."""
    program = capture(Odd(function).eval(), (torch.randn(4, 16), WHOLE))
    with pytest.raises(ModelError, match="divides whole numbers"):
        whole_call.build_call(program, host(), {})
    for fine in (lambda m, x, n: n // 3, lambda m, x, n: n / n.flip(0), lambda m, x, n: x / x, lambda m, x, n: n % 5.0):
        whole_call._check_divisors(capture(Odd(fine).eval(), (torch.randn(4, 16), WHOLE)).regions[""])


@pytest.mark.parametrize("function", [lambda m, x, n: torch.zeros(3), lambda m, x, n: m.table * 1.0, lambda m, x, n: m.table[:2],
                                      lambda m, x, n: m.table.expand(x.shape[0], 3, 16)])
def test_who_writes_into_a_result_does_not_write_into_the_model(function: Any) -> None:
    example = (torch.randn(4, 16), WHOLE)
    model = compiled(Odd(function), example, dynamic={"x": {0: "batch"}}, calls="library")
    assert model.whole is None
    assert "the same at every call" in model.report().calls or "no tensor that it computes" in model.report().calls
    with torch.no_grad():
        before = model(*example)[1].clone()
        model(*example)[1].add_(5) if before.stride()[0] else model(*example)[1][0].add_(5)
        assert torch.equal(model(*example)[1], before)


def test_calls_of_ever_new_sizes_do_not_take_ever_more_memory(encoder: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm_ffi

    assert encoder.whole is not None
    cleared = []
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda name: lambda: cleared.append(name))
    encoder.whole.library._sizes.clear()
    for size in (1, 2, 1, 3, 4, 1, 2, 3, 4):
        encoder(ids(1, size))
    assert not cleared
    for size in (5, 6, 7, 5, 8, 9):
        encoder(ids(1, size))
    assert cleared == ["vm.builtin.memory_manager.clear"] * 2


class Counting(nn.Module):
    """Counts its calls in a buffer, so that it is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.calls += 1
        self.mean.mul_(0.5).add_(y.mean(0).detach())
        return y + self.mean


def test_who_asks_for_a_library_is_told_why_there_is_none() -> None:
    parts = compiled(Counting(), (torch.randn(4, 16),), calls="library", decoding="library").report()
    assert parts.calls == "kernel by kernel: it was captured in parts, with Python between them"
    assert parts.decoding == "part by part: it has no generate()"
    whole = sc.compile(nn.ReLU().eval(), (torch.randn(4, 16),), recipe=Pipeline.parse("lower()"), calls="library", decoding="library").report()
    assert whole.calls == "kernel by kernel: no layer of it has a kernel"
    assert whole.decoding == "part by part: it was captured whole, and does not generate"


def test_what_a_model_counts_is_not_counted_in_another() -> None:
    """Neither while it is compiled, nor when what came of it is called, which starts where the model was."""
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(4, 16)
    with torch.no_grad():
        model(x)
        before = model.mean.clone()
        made = sc.compile(model, (x,), recipe=Pipeline.parse("lower()"))
        assert float(model.calls) == 1
        assert torch.equal(model.mean, before)
        first, second = made(x), made(x)
        assert float(model.calls) == 1
        assert torch.equal(model.mean, before)
        torch.testing.assert_close(first, model(x))
        torch.testing.assert_close(second, model(x))
        assert not torch.equal(first, second)


def test_a_buffer_in_which_two_modules_count_is_one_in_what_comes_of_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Counting(), Counting()).eval(), torch.randn(4, 16)
    model[1].register_buffer("mean", model[0].mean)
    with torch.no_grad():
        made = sc.compile(model, (x,), recipe=Pipeline.parse("lower()"))
        for _ in range(2):
            torch.testing.assert_close(made(x), model(x))
