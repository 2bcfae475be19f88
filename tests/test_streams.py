"""The dense kernel for few rows of x: the numbers of F.linear, on the model's own weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import sparsify_compiler as sc
from sparsify_compiler.codegen import runtime
from sparsify_compiler.codegen.kernels import streams
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.target import host

DTYPES = (torch.float32, torch.bfloat16)


def bound(weight: torch.Tensor, bias: torch.Tensor | None = None) -> streams.StreamLinear:
    found = runtime.candidates("linear", {"weight": weight}, {"any_rows": True}, weight.dtype, (1,), host())
    return next(candidate for candidate in found if candidate.name == streams.LABEL).bind(bias)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 4), outputs=st.integers(1, 200), vectors=st.integers(1, 9), biased=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_it_is_linear(rows: int, outputs: int, vectors: int, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + 10 * outputs + 1000 * vectors)
    x, weight = (torch.randn(n, 32 * vectors, generator=generator).to(dtype) for n in (rows, outputs))
    bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
    y = bound(weight, bias)(x)
    assert y.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    expected = linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * 10)


def test_strides_shapes_and_nan() -> None:
    weight = torch.randn(40, 64)
    kernel = bound(weight)
    x = torch.randn(64, 1, 1).transpose(0, 2)
    torch.testing.assert_close(kernel(x), linear(x, weight))
    x = torch.randn(1, 128)[:, ::2]
    torch.testing.assert_close(kernel(x), linear(x, weight))
    x = torch.randn(1, 64)
    x[0, 3] = torch.nan
    assert bool(kernel(x).isnan().all())
    with pytest.raises(InputError, match="64"):
        kernel(torch.randn(1, 63))
    with pytest.raises(InputError, match="float64"):
        kernel(torch.randn(1, 64, dtype=torch.float64))


def test_few_rows_run_in_the_kernel_and_more_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, asked = bound(torch.randn(16, 32)), []
    monkeypatch.setattr(streams, "linear", lambda x, weight, bias: asked.append(len(x)) or linear(x, weight, bias))
    for rows in range(streams.FEW_ROWS + 3):
        kernel(torch.randn(rows, 32))
    assert asked == [0, streams.FEW_ROWS + 1, streams.FEW_ROWS + 2]


def test_the_weight_is_not_copied() -> None:
    weight = torch.randn(64, 64)
    assert bound(weight).state()["weight"].data_ptr() == weight.data_ptr()


def test_it_is_offered_where_it_runs() -> None:
    def names(weight: torch.Tensor, rows: int) -> set[str]:
        return {one.name for one in runtime.candidates("linear", {"weight": weight}, {}, weight.dtype, (rows,), host())}

    assert streams.LABEL in names(torch.randn(8, 32), 1)
    assert streams.LABEL not in names(torch.randn(8, 32), streams.FEW_ROWS + 1)
    assert streams.LABEL not in names(torch.randn(8, 31), 1)
    with pytest.raises(KernelError, match="does not fit"):
        streams.bind("linear", {"dtype": "float32"}, {"weight": torch.randn(8, 31)}, {}, None, {}, host(), [])


def test_what_an_artefact_holds_is_loaded() -> None:
    weight, x = torch.randn(64, 64), torch.randn(1, 64)
    made = bound(weight)
    again = runtime.rebind("linear", {"family": streams.NAME, **made.options}, {"weight": weight}, {}, None, made.files(), host())
    assert again.name == streams.LABEL
    assert torch.equal(again(x), made(x))


def test_the_last_layer_of_a_language_model_takes_it_or_a_faster_one() -> None:
    """Layers that stay dense in a model in parts are measured at one row, and say so."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 512, (2, 6))
    compiled = sc.compile(model, {"input_ids": ids}, recipe="lower()", dynamic={"input_ids": {0: "batch", 1: "tokens"}})
    assert {site.rows for site in compiled.report().sites if site.kind == "linear"} == {1}
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
                       model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_layer_has_no_packed_form(shape: tuple[int, int]) -> None:
    """oneDNN packs no empty weight."""
    assert not runtime.candidates("linear", {"weight": torch.zeros(shape, dtype=torch.float32)}, {"any_rows": True}, torch.float32, (1,), host())
