"""Tokens of a language model by one library: what generate() writes, and what it says of every token, are those of the model by parts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from models.language import llama
from models.misaligned import misalign
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import library_cache, opaque, step_choice
from sparsify_compiler.codegen import whole_graph_here
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import InputError, KernelError, ModelError
from sparsify_compiler.held import OWN
from sparsify_compiler.measure import Timing
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.step import Step
from sparsify_compiler.step_choice import choose_step, is_wanted
from sparsify_compiler.step_graph import attend_step, step_graph
from sparsify_compiler.step_library import build_step

transformers = pytest.importorskip("transformers")

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "sampling": {"do_sample": True, "top_k": 5}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"},
    "static beams": {"num_beams": 2, "cache_implementation": "static"},
}
TOKENS = 9
DYNAMIC = {"input_ids": {0: "batch", 1: "tokens"}}
MODEL = llama(hidden_size=64, intermediate_size=128, max_position_embeddings=512)


def with_library(model: CompiledModel) -> None:
    """Without asking whether it is faster."""
    assert model.target is not None
    model.decode_by(Step(build_step(model.program, step_graph(model.program), model.target), 16))


def compiled(model: nn.Module, recipe: str, **options: Any) -> CompiledModel:
    data = [{"input_ids": torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))}]
    passes = Pipeline.parse(f"{recipe} | pack() | lower(margin=-1000.0, rounds=1)")
    return sc.compile(model, data[0], recipe=passes, calibration=data, dynamic=DYNAMIC, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens select half of their inputs, and the library that decodes with it."""
    made = compiled(MODEL, "select_inputs(density=0.5)", decoding="parts")
    assert made.step is None
    with_library(made)
    place = tmp_path_factory.mktemp("step") / "saved"
    made.save(place)
    return place


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[CompiledModel, CompiledModel]:
    """By the library, and by parts."""
    library, parts = (sc.load(folder, model=MODEL) for _ in range(2))
    assert parts.step is not None
    parts.step.most = 0
    return library, parts


def taken(model: CompiledModel) -> int:
    assert model.step is not None
    return model.step.calls


def texts(batch: int) -> tuple[Tensor, Tensor]:
    """Padded on the left, all but the first."""
    ids = torch.randint(1, 96, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1:, :4], mask[1:, :4] = 0, 0
    return ids, mask


def generated(model: Any, batch: int, **options: Any) -> Tensor:
    ids, mask = texts(batch)
    torch.manual_seed(0)
    usual = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 200}
    with torch.no_grad():
        tokens: Tensor = model.generate(ids, attention_mask=mask, **{**usual, **options})
    return tokens


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_writes_what_it_writes_by_parts(pair: tuple[CompiledModel, CompiledModel], way: str, batch: int) -> None:
    library, parts = pair
    before = taken(library)
    assert torch.equal(generated(library, batch, **WAYS[way]), generated(parts, batch, **WAYS[way]))
    assert taken(library) - before == TOKENS - 1    # all but the prompt
    assert taken(parts) == 0


def test_a_text_longer_than_its_first_room(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    library, parts = pair
    monkeypatch.setattr(library_cache, "SPARE", 4)
    before = taken(library)
    assert torch.equal(generated(library, 1, max_new_tokens=40), generated(parts, 1, max_new_tokens=40))
    assert taken(library) - before == 39


def test_generate_compiles_the_model_and_not_the_library(pair: tuple[CompiledModel, CompiledModel]) -> None:
    """Its own compilation of a step sees the model with its kernels, and breaks at none of them."""
    from transformers.generation import CompileConfig

    graphs: list[torch.fx.GraphModule] = []

    def watch(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    how = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=watch)
    how._compile_all_devices = True
    library, parts = pair
    torch._dynamo.reset()
    before = taken(library)
    found = generated(library, 1, cache_implementation="static", compile_config=how)
    assert torch.equal(found, generated(parts, 1, cache_implementation="static"))
    assert taken(library) == before
    assert graphs
    assert sum(node.target in (opaque.op, opaque.inputs_op) for node in graphs[0].graph.nodes) > 4, "kernels are called in it"


def test_streaming(pair: tuple[CompiledModel, CompiledModel]) -> None:
    seen: list[int] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[name-defined,misc]
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    tokens = generated(pair[0], 1, streamer=Streamer())
    assert seen == [*tokens[0].tolist(), -1]


def prompt(model: CompiledModel, batch: int = 2) -> tuple[Any, Tensor, Tensor]:
    """The cache of a prompt, the token behind it, and the mask of both."""
    ids, mask = texts(batch)
    read = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1], use_cache=True)
    return read.cache, ids[:, -1:], mask


def said(model: CompiledModel, state: tuple[Any, Tensor, Tensor]) -> Tensor:
    cache, token, mask = state
    logits: Tensor = model(input_ids=token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, cache=cache).logits
    return logits


@torch.no_grad()
def test_logits_are_those_of_the_model(pair: tuple[CompiledModel, CompiledModel]) -> None:
    library, _ = pair
    states = [prompt(one) for one in pair]
    before = taken(library)
    for _ in range(3):
        found, expected = (said(one, state) for one, state in zip(pair, states, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        states = [(cache, found.argmax(-1), torch.nn.functional.pad(mask, (0, 1), value=1)) for cache, _, mask in states]
    assert taken(library) - before == 3
    for one, other in zip(states[0][0].layers, states[1][0].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_users_do_to_a_cache(pair: tuple[CompiledModel, CompiledModel]) -> None:
    """Copies go ways of their own; keys that somebody holds stay; cropping and reordering count."""
    library, parts = pair
    state = prompt(library)
    other = deepcopy(state)
    held = state[0].layers[0].keys
    before = held.clone()
    first = said(library, state)
    said(library, (other[0], torch.tensor([[7], [8]]), other[2]))
    assert torch.equal(held, before)
    state[0].crop(-1 if state[0].get_seq_length() == 9 else 8)
    torch.testing.assert_close(said(library, state), first)
    swapped, expected = prompt(library), prompt(parts)
    for cache, _, _ in (swapped, expected):
        cache.reorder_cache(torch.tensor([1, 1]))
    mask = swapped[2][[1, 1]]
    torch.testing.assert_close(said(library, (swapped[0], swapped[1], mask)), said(parts, (expected[0], expected[1], mask)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["hole", "gradient", "hidden", "two tokens", "hook", "tuple"])
def test_calls_that_it_does_not_take(pair: tuple[CompiledModel, CompiledModel], case: str) -> None:
    """They are answered as ever."""
    library, _ = pair
    with torch.no_grad():
        states = [prompt(one) for one in pair]
    options: dict[str, Any] = {"hidden": {"output_hidden_states": True}, "tuple": {"return_dict": False},
                               "two tokens": {"input_ids": torch.tensor([[7, 8], [9, 10]]), "position_ids": torch.tensor([[8, 9], [4, 5]]),
                                              "attention_mask": torch.nn.functional.pad(states[0][2], (0, 1), value=1)}}.get(case, {})
    if case == "hole":
        for _, _, mask in states:
            mask[0, 3] = 0
    seen: list[int] = []
    norm = library.model.get_submodule("model.norm")
    handle = norm.register_forward_hook(lambda *_: seen.append(1)) if case == "hook" else None
    before = taken(library)
    with torch.set_grad_enabled(case == "gradient"):
        if case == "hook":
            prompt(library)     # whoever looks is noticed when a text begins
        results = [one(**{"input_ids": state[1], "attention_mask": state[2], "position_ids": state[2].sum(1, keepdim=True) - 1, "cache": state[0],
                          **options}) for one, state in zip(pair, states, strict=True)]
    assert taken(library) == before
    assert case != "hook" or len(seen) == 2
    if handle is not None:
        handle.remove()
        prompt(library)
    found, expected = (result[0] if case == "tuple" else result.logits for result in results)
    torch.testing.assert_close(found, expected)
    assert case != "hidden" or results[0].hidden_states is not None
    generated(library, 1)
    assert taken(library) - before == TOKENS - 1    # the next text is decoded by it again


@torch.no_grad()
@pytest.mark.parametrize("case", ["word", "negative", "place", "weighs", "places from the mask"])
def test_what_only_the_model_knows_is_left_to_it(pair: tuple[CompiledModel, CompiledModel], case: str) -> None:
    """Errors of rows that no table has, masks that weigh tokens, positions that are not given for padded texts."""
    library, _ = pair
    cache, token, mask = prompt(library)
    weighs = torch.zeros(2, 1, 1, 9)
    weighs[..., :3] = -0.5
    cases: dict[str, dict[str, Any]] = {"word": {"input_ids": torch.tensor([[7], [MODEL.config.vocab_size]])},
                                        "negative": {"input_ids": torch.tensor([[-1], [7]])},
                                        "place": {"position_ids": torch.tensor([[8], [512]])}, "weighs": {"attention_mask": weighs},
                                        "places from the mask": {"position_ids": None}}
    usual: dict[str, Any] = {"input_ids": token, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "cache": cache}
    before = taken(library)
    try:
        library(**{**usual, **cases[case]})
    except IndexError:
        assert case in ("word", "negative")
    else:
        assert case not in ("word", "negative")
    assert taken(library) == before


@torch.no_grad()
def test_masks_of_floats_and_positions_of_32_bits(pair: tuple[CompiledModel, CompiledModel]) -> None:
    states = [prompt(one) for one in pair]
    mask = states[0][2]
    hidden = torch.zeros(2, 1, 1, 9).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    before = taken(pair[0])
    found, expected = (one(input_ids=token, attention_mask=hidden, position_ids=(mask.sum(1, keepdim=True) - 1).int(), cache=cache).logits
                       for one, (cache, token, _) in zip(pair, states, strict=True))
    assert taken(pair[0]) == before + 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_held_once(folder: Path, pair: tuple[CompiledModel, CompiledModel]) -> None:
    """Saved, loaded, with the weights of the kernels by parts; bytes of a bias at most are its own."""
    library = pair[0].step
    assert library is not None
    places = [place[0] for place, _ in library.library.parameters]
    assert places.count("kernel") > 10
    assert sum(tensor.numel() for tensor in library.library.own) < 4096
    assert len(list((folder / "kernels").glob("step-*.so"))) == 1
    again = sc.load(folder, model=MODEL, rebuild=True)
    assert again.step is not None
    assert torch.equal(generated(again, 1), generated(pair[1], 1))
    assert [place[0] == OWN for place, _ in again.step.library.parameters] == [place == OWN for place in places]
    copied, before = deepcopy(again), taken(again)
    assert torch.equal(generated(copied, 1), generated(pair[1], 1))
    assert taken(again) - before == TOKENS - 1, "a copy decodes by the same library"


def test_the_code_is_found_again_by_other_processes(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(whole_graph_here, "library", lambda _, text, __: told.append(text) or (b"", []))  # type: ignore[func-returns-value]
    program, target = pair[0].program, pair[0].target
    assert target is not None
    with pytest.raises(KernelError):
        build_step(program, step_graph(program), target)
    assert "attend_step(" in told[0]
    assert " at 0x" not in told[0]


def test_half_precision(tmp_path: Path) -> None:
    """Caches of bfloat16 are read and written as they are, and weights, which kernels read in words of two, are held once, saved and loaded too."""
    model = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1).to(torch.bfloat16)
    library, parts = (dense(model) for _ in range(2))
    with_library(library)
    with torch.no_grad():
        found, expected = (said(one, prompt(one)) for one in (library, parts))
        library.save(tmp_path / "saved")
        again = sc.load(tmp_path / "saved", model=model)
        assert torch.equal(said(again, prompt(again)), found)
    assert taken(library) == taken(again) == 1
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=1e-2)
    for one in (library, again):
        assert one.step is not None
        assert sum(tensor.numel() for tensor in one.step.library.own) < 1024, "zeros in the place of biases"


def dense(model: nn.Module) -> CompiledModel:
    return sc.compile(model, {"input_ids": torch.randint(1, 96, (2, 7))}, recipe=Pipeline.parse("pack() | lower(rounds=1)"), dynamic=DYNAMIC,
                      decoding="parts")


def test_attention_of_a_step() -> None:
    """The formula that the kernel stands for: the new token is written, what is hidden is not read."""
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    caches = [torch.randn(2, 2, 6, 8) for _ in range(2)]
    found = attend_step(query, key, value, torch.tensor([3]), torch.tensor([0, 2]), caches[0], caches[1], None)
    assert torch.equal(caches[0][:, :, 3:4], key)
    expected = torch.nn.functional.scaled_dot_product_attention(query[1:], caches[0][1:, :, 2:4], caches[1][1:, :, 2:4], enable_gqa=True)
    torch.testing.assert_close(found[1:], expected)


def choice(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch, times: dict[int, tuple[float, float]],
           anew: bool = False) -> step_choice.Choice:
    """Chosen at these milliseconds (by parts, by the library) of so many texts; of the library that there is, or of one that is built anew."""
    rounds = iter(times.values())

    def interleave(forms: Any, **_: Any) -> dict[str, Timing]:
        for form in forms.values():
            form()
        return {name: Timing(one, one, one) for name, one in zip(forms, next(rounds), strict=True)}

    monkeypatch.setattr(step_choice, "interleave", interleave)
    parts = pair[1]
    assert parts.target is not None
    if not anew:
        assert parts.step is not None
        there = parts.step.library
        monkeypatch.setattr(step_choice, "step_graph", lambda _: None)
        monkeypatch.setattr(step_choice, "build_step", lambda *_: there)
    return choose_step(parts.program, parts.model, parts.target)


def test_the_faster_way_is_kept(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choice(pair, monkeypatch, {1: (4.0, 1.0), 2: (4.0, 2.0), 4: (4.0, 5.0)}, anew=True)
    assert chosen.step is not None
    assert chosen.step.most == 2
    assert "one library for batches up to 2: a token takes 1.00 ms, and 4.00 ms part by part" in chosen.told
    slower = choice(pair, monkeypatch, {1: (1.0, 2.0)})
    assert slower.step is None
    assert slower.told == "part by part: a token takes 1.0 ms, and would take 2.0 ms by one library"


def say_times(monkeypatch: pytest.MonkeyPatch, usual: Any, factor: float) -> None:
    """Libraries say what they say, times a factor, of calls that they take."""
    def decode(*given: Any) -> Tensor | None:
        logits: Tensor | None = usual(*given)
        return None if logits is None else logits * factor

    monkeypatch.setattr(Step, "decode", decode)


def test_a_library_that_says_something_else_is_refused(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Step.decode
    say_times(monkeypatch, usual, 1.01)
    told = choice(pair, monkeypatch, {})
    assert told.step is None
    assert "its step by one library is 1.0e-02 from the model's own" in told.told


@pytest.mark.parametrize(("wrong", "kept"), [((0,), True), ((1,), True), ((0, 1), False), ((0, 2), False), ((1, 2), False), ((1, 3), False)])
def test_one_text_of_three_may_be_moved(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, ...],
                                        kept: bool) -> None:
    """By an input that is so near a limit that rounding selects it: whatever follows is moved. Texts by number, as they are compared."""
    usual, asked = Step.decode, list[int]()

    def decode(*given: Any) -> Tensor | None:
        logits: Tensor | None = usual(*given)
        if logits is None:      # asked of the one by parts, whose library takes no call
            return None
        asked.append(len(asked))
        return logits * (1.05 if asked[-1] in wrong else 1.0)

    monkeypatch.setattr(Step, "decode", decode)
    assert (choice(pair, monkeypatch, {1: (4.0, 1.0), 2: (1.0, 2.0)}).step is not None) is kept


def test_a_model_that_rounding_moves_as_far_has_its_library(pair: tuple[CompiledModel, CompiledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that selects inputs in bfloat16: what it says of a cache that was rounded otherwise is as far from what it says of its own."""
    usual, rounded, by = Step.decode, step_choice._rounded, [1.1]

    def further(cache: Any, way: int) -> Any:
        copied = rounded(cache, way)
        for layer in copied.layers:
            layer.values.mul_(by[0])
        return copied

    say_times(monkeypatch, usual, 1.002)
    assert choice(pair, monkeypatch, {}).step is None
    monkeypatch.setattr(step_choice, "_rounded", further)
    assert choice(pair, monkeypatch, {1: (4.0, 1.0), 2: (1.0, 2.0)}).step is not None
    say_times(monkeypatch, usual, 1.6)
    assert choice(pair, monkeypatch, {}).step is None
    say_times(monkeypatch, usual, 1.95)
    by[0] = -30.0
    assert choice(pair, monkeypatch, {}).step is None, "nearly all of the logits at the most, however far the model itself moves"
    say_times(monkeypatch, usual, 0.0)
    assert choice(pair, monkeypatch, {}).step is None, "never one that says nothing"


def test_models_without_a_step() -> None:
    """The report says why, and nothing else happens."""
    recipe = Pipeline.parse("select_blocks(always=(SlidingWindow(window=4),), block_q=2, block_k=2, dense_below=1) | pack()")
    model = llama(num_hidden_layers=1)
    blocks = sc.compile(model, {"input_ids": torch.randint(1, 96, (2, 7))}, dynamic=DYNAMIC, decoding="library", recipe=recipe)
    assert blocks.step is None
    assert blocks.report().decoding.startswith("part by part: ")
    assert "attends to some of the keys only" in blocks.report().decoding
    whole = sc.compile(model, {"input_ids": torch.randint(1, 96, (2, 7)), "use_cache": False}, dynamic=DYNAMIC, decoding="library",
                       recipe=Pipeline.parse("pack()"))
    assert whole.step is None
    assert whole.report().decoding == "part by part: it was captured whole, and does not generate"
    with pytest.raises(ModelError, match="captured whole"):
        step_graph(whole.program)


def test_a_large_model_has_its_library_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(step_choice, "choose_step", lambda *given: asked.append(given) or step_choice.Choice(None, "asked"))  # type: ignore[func-returns-value]
    model, ids = llama(num_hidden_layers=1), {"input_ids": torch.randint(1, 96, (2, 7))}
    for least, told in ((step_choice.WORTH, ""), (1, "asked")):
        monkeypatch.setattr(step_choice, "WORTH", least)
        assert sc.compile(model, ids, recipe=Pipeline.parse("pack()"), dynamic=DYNAMIC).report().decoding == told
    assert len(asked) == 1


@pytest.mark.parametrize("error", [OSError("no room\nat all"), MemoryError(), ZeroDivisionError("division by zero")])
def test_a_library_that_fails_somehow_is_left_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model compiles all the same, and its report says why and how long that took."""
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(step_choice, "WORTH", 1)
    monkeypatch.setattr(step_choice, "build_step", fail)
    ids = {"input_ids": torch.randint(1, 96, (2, 7))}
    report = sc.compile(llama(num_hidden_layers=1), ids, recipe=Pipeline.parse("pack()"), dynamic=DYNAMIC).report()
    told = f"{type(error).__name__} {str(error).partition(chr(10))[0]}".rstrip()
    assert report.decoding == f"part by part: its step cannot be made: {told}"
    assert "decoding" in [one.name for one in report.passes]


def test_what_is_asked_for(pair: tuple[CompiledModel, CompiledModel]) -> None:
    program = pair[0].program
    assert [is_wanted(how, program, size) for how, size in (("auto", 1 << 20), ("auto", 1 << 30), ("library", 1), ("parts", 1 << 30))] == [
        False, True, True, False]
    with pytest.raises(InputError, match="decoding is auto, library, parts"):
        compiled(MODEL, "select_inputs(density=0.5)", decoding="libary")


def test_weights_that_start_anywhere_are_read_where_they_lie(tmp_path: Path) -> None:
    """Tables of words are read a line at a time: where they began within one the process ended."""
    model = misalign(llama(hidden_size=64, intermediate_size=128, max_position_embeddings=512))
    made = compiled(model, "select_inputs(density=0.5)", decoding="parts")
    expected = made.generate(texts(2)[0], max_new_tokens=TOKENS, do_sample=False)
    with_library(made)
    assert made.step is not None
    assert [one.data_ptr() % 64 for _, one in made.step.library.parameters if one.shape == model.model.embed_tokens.weight.shape] == [24]
    made.save(tmp_path / "saved")
    for one in (made, sc.load(tmp_path / "saved", model=model)):
        assert one.step is not None
        assert not one.step.library.own
        assert torch.equal(one.generate(texts(2)[0], max_new_tokens=TOKENS, do_sample=False), expected)
        assert taken(one) > 0


def test_why_there_is_no_step_is_said_in_one_line() -> None:
    """BART's line was an error within torch.export, over two."""
    pair = SimpleNamespace(skeleton=SimpleNamespace(generate=print, config=SimpleNamespace(is_encoder_decoder=True)), nodes=list)
    with pytest.raises(ModelError, match="writes one text while it reads another"):
        step_graph(cast(Any, pair))
    assert step_choice.refused("as usual", "step", ModelError("it has\nno end", where="lm")) == "as usual: lm: it has no end"
    assert step_choice.refused("as usual", "step", ValueError("one\ntwo")) == "as usual: its step cannot be made: ValueError one"
    assert step_choice.one_line("a reason\n  over two lines") == "a reason over two lines"
    assert len(step_choice.one_line("so long " * 99)) <= 2 * step_choice.LINE
