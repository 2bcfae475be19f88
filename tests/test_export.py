"""What a compiled model can be written as for everybody else: ONNX, the layout of Hugging Face, dense safetensors."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import sparsify_compiler as sc
from sparsify_compiler.cli import main
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import InputError, ModelError, SparsifyError

BATCH = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}


def by_onnx(path: Path, **inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """The outputs, by onnxruntime where it is there, else by the reference of ONNX."""
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        return list(onnxruntime.InferenceSession(str(path)).run(None, given))
    import onnx
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(str(path))
    return list(ReferenceEvaluator(str(path)).run(None, given))     # type: ignore[arg-type]


def compiled(net: nn.Module, example: Any, recipe: Any = "wanda", dynamic: Any = None) -> CompiledModel:
    budget = None if "(" in str(recipe) else sc.Budget(density=0.4)
    return sc.compile(net, example, recipe=recipe, budget=budget, calibration=[example], dynamic=dynamic)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                max_position_embeddings=32)).eval()


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 100, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, length // 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def small_bert(bert: BertModel) -> CompiledModel:
    return compiled(bert, tokens(2, 8), dynamic=BATCH)


def test_onnx_computes_the_same_on_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    model = compiled(net, (torch.randn(8, 32),), dynamic={"input": {0: "batch"}})
    model.export_onnx(tmp_path / "model.onnx")
    for rows in (2, 5):
        x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows), dtype=torch.float32)
        found, = by_onnx(tmp_path / "model.onnx", input=x)
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_of_an_encoder(small_bert: CompiledModel, tmp_path: Path) -> None:
    small_bert.export_onnx(tmp_path / "bert.onnx")
    given = tokens(3, 10)
    expected = small_bert(**given)
    found = by_onnx(tmp_path / "bert.onnx", **given)
    for one, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other.detach(), rtol=1e-3, atol=1e-4)


def test_onnx_of_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten()).eval()
    image = torch.randn(2, 3, 12, 12)
    model = compiled(net, (image,))
    model.export_onnx(tmp_path / "conv.onnx")
    found, = by_onnx(tmp_path / "conv.onnx", input=image)
    torch.testing.assert_close(torch.from_numpy(found), model(image).detach(), rtol=1e-3, atol=1e-4)


def test_what_has_no_form_in_onnx_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    x = torch.randn(1, 32, dtype=torch.float32)
    pipeline = sc.Pipeline.parse("select_inputs(density=0.5) | pack() | lower(margin=-1000.0)")
    model = sc.compile(net, (x,), recipe=pipeline, calibration=[(x,)])
    with pytest.raises(ModelError, match=r"select.* has no form outside of this project"):
        model.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(small_bert: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify_compiler.export_onnx.NEEDS", ("onnx", "onnx_from_nowhere"))
    with pytest.raises(ModelError, match=r"onnx_from_nowhere are needed(.|\n)*pip install"):
        small_bert.export_onnx(tmp_path / "model.onnx")


def test_from_pretrained_loads_what_was_masked(bert: BertModel, small_bert: CompiledModel, tmp_path: Path) -> None:
    small_bert.export_huggingface(tmp_path / "out", like=bert)
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    given = tokens(2, 8)
    torch.testing.assert_close(again(**given).last_hidden_state, small_bert(**given).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert (again.encoder.layer[0].output.dense.weight == 0).float().mean() > 0.5
    bert.save_pretrained(tmp_path / "original")
    small_bert.export_huggingface(tmp_path / "out", like=tmp_path / "original")      # replaces the first
    second = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(second[name], tensor) for name, tensor in again.state_dict().items() if name in second)


def test_neurons_that_went_from_every_layer_are_in_the_configuration(bert: BertModel, tmp_path: Path) -> None:
    model = compiled(bert, tokens(2, 8), "remove_channels(density=0.75, multiple=16)")
    sizes = {row.shape for row in model.report().sites if "intermediate" in row.site}
    assert len(sizes) == 1
    model.export_huggingface(tmp_path / "out", like=bert)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == next(iter(sizes))[0] < 64
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    given = tokens(2, 8)
    torch.testing.assert_close(again(**given).last_hidden_state, model(**given).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_neurons_that_went_unevenly_are_refused(bert: BertModel, tmp_path: Path) -> None:
    model = compiled(bert, tokens(2, 8), "remove_channels(density=0.75, multiple=16, targets=('re:encoder.layer.0.*',))")
    with pytest.raises(ModelError, match="no configuration of BertModel"):
        model.export_huggingface(tmp_path / "out", like=bert)
    assert not list(tmp_path.iterdir())


def test_a_language_model_in_parts_has_a_configuration_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                      num_key_value_heads=2)).eval()
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    model = compiled(lm, {"input_ids": ids}, dynamic={"input_ids": {0: "batch", 1: "tokens"}})
    model.export_huggingface(tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("like", [None, nn.Linear(2, 2), "/no/such/folder"])
def test_without_a_configuration(small_bert: CompiledModel, tmp_path: Path, like: Any) -> None:
    with pytest.raises(InputError, match="configuration of Hugging Face"):
        small_bert.export_huggingface(tmp_path / "out", like=like)


def test_the_command(small_bert: CompiledModel, bert: BertModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_bert.save(tmp_path / "saved")
    bert.save_pretrained(tmp_path / "original")
    assert main(["export", f"{tmp_path}/saved", "--form", "safetensors", "--out", f"{tmp_path}/dense.safetensors"]) == 0
    assert main(["export", f"{tmp_path}/saved", "--form", "huggingface", "--out", f"{tmp_path}/hf", "--like", f"{tmp_path}/original"]) == 0
    dense, layout = load_file(tmp_path / "dense.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(layout[name], tensor) for name, tensor in dense.items() if name in layout)
    assert main(["export", f"{tmp_path}/saved", "--form", "onnx", "--out", f"{tmp_path}/m.onnx", "--like", "x"]) == 2
    assert main(["export", f"{tmp_path}/nothing", "--form", "onnx", "--out", f"{tmp_path}/m.onnx"]) == 2
    assert main(["export", f"{tmp_path}/saved", "--form", "tflite", "--out", f"{tmp_path}/m"]) == 2
    assert "--like is of --form huggingface" in capsys.readouterr().err
    assert issubclass(ModelError, SparsifyError)
