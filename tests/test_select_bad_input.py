"""Bad input of activation sparsity: a typed error or the right result, never a wrong number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from select_help import rewritten
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, InputError, SelectorError
from sparsify_compiler.ops import select, select_linear
from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.passes.activation.select_neurons import GatedFfn, SelectNeurons
from sparsify_compiler.passes.activation.selectors._base import count_of
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline

SELECTORS = catalog.names("selector")


def linear(inputs: int = 12) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8)).eval(), [(torch.randn(20, inputs),)]


def test_a_model_without_ffns() -> None:
    net, data = linear()
    with pytest.raises(SelectorError, match="ffn"):
        rewritten(SelectInputs(density=0.5, targets=("ffn",)), net, data)
    after, ctx = rewritten(SelectNeurons(density=0.5), net, data)
    assert [miss.why for miss in ctx.misses] == ["the model has no FFN"]
    with torch.no_grad():
        assert torch.equal(instantiate(after)(*data[0]), net(*data[0]))
    with pytest.raises(SelectorError):
        rewritten(SelectNeurons(density=0.5, targets=("blocks.*",)), net, data)


def test_no_more_inputs_are_selected_than_there_are() -> None:
    assert count_of(torch.randn(3, 5), 7.0) == 5
    assert count_of(torch.randn(3, 5), 1e-9) == 1
    net, data = linear(1)  # one input: it is read, whatever the density
    after, _ = rewritten(SelectInputs(selector="top_k", density=0.1), net, data)
    with torch.no_grad():
        torch.testing.assert_close(instantiate(after)(*data[0]), net(*data[0]))


def test_what_was_calibrated_on_another_width_is_refused() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, 4)
    for vectors in ({"scale": torch.rand(7)}, {"center": torch.rand(9)}):
        with pytest.raises(RuntimeError, match="needs"):
            select.op(x, torch.tensor(0.5), **vectors)
        with pytest.raises(RuntimeError, match="needs"):
            select_linear.op(x, torch.tensor(0.5), weight, **vectors)
    net, data = linear()
    after, _ = rewritten(SelectInputs(density=0.5), net, data)
    with pytest.raises(InputError, match="fixed size 12"):
        instantiate(after)(torch.randn(4, 13))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("step", ["inputs", "neurons"])
def test_a_nan_reaches_its_row_and_no_other(selector: str, step: str) -> None:
    net, data = linear()
    if step == "neurons":
        net, data = GatedFfn(12, 24).eval(), [(torch.randn(20, 12),)]
    after, _ = rewritten(SelectInputs(selector=selector, density=0.3) if step == "inputs" else SelectNeurons("magnitude", selector, 0.3), net, data)
    x = data[0][0].clone()
    x[2, 5] = float("nan")
    with torch.no_grad():
        y, clean = instantiate(after)(x), instantiate(after)(data[0][0])
    assert bool(y[2].isnan().all())
    rest = torch.arange(20) != 2
    torch.testing.assert_close(y[rest], clean[rest])


@pytest.mark.parametrize("step", [SelectInputs(density=0.5), SelectInputs(density=0.5, budget="block_greedy"), SelectNeurons(density=0.5)], ids=str)
def test_batches_that_are_empty_or_not_finite(step: Pass) -> None:
    net, data = GatedFfn(12, 24).eval(), [(torch.randn(20, 12),)]
    bad = torch.randn(20, 12)
    bad[0, 0] = float("nan")
    for batches, what in (([], "no batch"), ([(bad,)], "NaN or infinite")):
        ctx = Context(batches=batches)
        ctx.calibrate = lambda program, needs, batches=batches: calibrate(program, batches, needs, cache=False)  # type: ignore[misc]
        with pytest.raises(CalibrationError, match=what):
            Pipeline((step,)).run(capture(net, data[0]), ctx, ())
    after, _ = rewritten(step, net, data)
    with pytest.raises(InputError, match="1 or more"):
        instantiate(after)(torch.randn(0, 12))


def test_a_sequence_longer_than_the_cache_fails_as_in_the_dense_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                      max_position_embeddings=16)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(1, 96, (1, 24))
    data = [{"input_ids": ids[:, :12]}]
    sparse = sc.compile(model, data[0], recipe=Pipeline.parse("select_inputs(density=1.0) | pack() | lower(margin=-1000.0, rounds=3)"),
                        calibration=data, dynamic={"input_ids": {0: "batch", 1: "tokens"}})

    def failing(net: Any) -> str:
        with torch.no_grad(), pytest.raises((RuntimeError, IndexError, ValueError)) as found:
            net(ids, past_key_values=transformers.StaticCache(config, max_cache_len=8))
        return type(found.value).__name__

    assert failing(sparse) == failing(model)
    with torch.no_grad():  # beyond the positions that it was made for, a rotary model goes on: so does the compiled one
        torch.testing.assert_close(sparse(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
