"""Convolutional networks and language models as one library: equal to torch's own, the caches changed in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_graph_help import build_example, example, runner

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ModelError
from sparsify_compiler.export_library_cached import attend_cached, empty_caches, with_cache
from sparsify_compiler.passes_api import Context
from sparsify_compiler.target import host


class Network(nn.Module):
    """A stem that is padded at one side, a depthwise convolution, a residual, a mean of planes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 32, 1, bias=False)
        self.each, self.narrow = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 8, 1)
        self.last, self.head = nn.Conv2d(8, 16, 3, padding=1, dilation=1), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(F.pad(image, (0, 1, 0, 1))).relu()
        x = x + self.narrow(F.relu6(self.each(F.relu6(self.wide(x)))))
        return self.head(F.adaptive_avg_pool2d(F.hardswish(self.last(x)), 1).flatten(1))


class Decoder(nn.Module):
    """Two layers over learned places, grouped queries, a causal attention."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.words, self.places, self.causal = nn.Embedding(40, 32), nn.Embedding(24, 32), causal
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(32, 32), "k": nn.Linear(32, 16), "v": nn.Linear(32, 16), "o": nn.Linear(32, 32),
                                                   "norm": nn.RMSNorm(32), "up": nn.Linear(32, 48), "down": nn.Linear(48, 32)}) for _ in range(2))
        self.head = nn.Linear(32, 40, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            y = layer["norm"](x)
            q, k, v = (layer[name](y).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv")
            k, v = (one[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for one in (k, v))
            x = x + layer["o"](F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
            x = x + layer["down"](F.silu(layer["up"](x)))
        return self.head(x)


class Masked(nn.Module):
    """Attentions under masks that are broadcast along keys, and over batch and heads; a mean of whole numbers."""

    def forward(self, x: Tensor, mask: Tensor, flat: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        attended = [F.scaled_dot_product_attention(x, x, x, attn_mask=one) for one in (mask, flat)]
        return *attended, numbers.mean(-1, dtype=torch.float32)


def program_of(model: nn.Module, example: Tensor, dynamic: dict[str, dict[int, str]]) -> Any:
    return capture(model.eval(), (example,), dynamic)


def decoder(causal: bool = True) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Decoder(causal).eval()
    return model, program_of(model, torch.randint(0, 40, (2, 6)), {"input_ids": {0: "batch", 1: "tokens"}})


def test_a_cache_as_arguments_is_what_it_was_without() -> None:
    """with_cache compares numbers itself; the graph that it makes reads the caches in order."""
    _, program = decoder()
    made = with_cache(program.regions[""])
    assert made.caches == {f"{kind}_{layer}": (2, 8) for layer in range(2) for kind in ("key", "value")}
    assert [node.name for node in made.region.graph.nodes if node.op == "placeholder"] == ["input_ids", "past", *made.caches]
    assert sum(node.target is attend_cached for node in made.region.graph.nodes) == 2
    assert [tuple(one.shape) for one in empty_caches(made.caches, 3, 9)] == [(3, 2, 9, 8)] * 4


@pytest.mark.parametrize(("model", "shape", "dynamic", "told"), [
    (lambda: Decoder(causal=False), (2, 6), {0: "batch", 1: "tokens"}, "still to come"),
    (Decoder, (2, 6), {0: "batch"}, "tokens dynamic"),
    (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), (2, 6), {0: "batch", 1: "tokens"}, "no attention"),
])  # fmt: skip
def test_models_that_have_no_such_cache(model: Any, shape: tuple[int, int], dynamic: dict[int, str], told: str) -> None:
    made = model()
    name = "input_ids" if isinstance(made, Decoder) else "input"
    with pytest.raises(ModelError, match=told):
        with_cache(program_of(made, torch.randint(0, 9, shape), {name: dynamic}).regions[""])


def test_what_kernels_do_not_take_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 3, 20, 8), "mask": torch.randn(2, 1, 20, 1), "flat": torch.rand(20, 20) > 0.3,
             "numbers": torch.randint(-3, 3, (4, 16))}
    compiled = CompiledModel(capture(Masked().eval(), given))
    compiled.export(tmp_path / "out")
    found = runner(tmp_path / "out").Model(tmp_path / "out").run(**{name: value.numpy() for name, value in given.items()})
    for one, expected in zip(found.values(), compiled(**given), strict=True):
        torch.testing.assert_close(torch.from_numpy(numpy.array(one)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_a_network_of_convolutions(tmp_path: Path, sparse: bool) -> None:
    torch.manual_seed(0)
    program = program_of(Network(), torch.randn(2, 3, 20, 20), {"image": {0: "batch"}})
    if sparse:
        program = sc.Pipeline.parse("mask_weights(score=magnitude, density=0.5, targets=('wide', 'narrow')) | pack()").run(program, Context())
    compiled = CompiledModel(program)
    compiled.export(tmp_path / "out")
    model = runner(tmp_path / "out").Model(tmp_path / "out")
    assert model.manifest["reference"] == []
    for batch in (1, 3):
        image = torch.randn(batch, 3, 20, 20)
        with torch.no_grad():
            expected = compiled(image)
        torch.testing.assert_close(torch.from_numpy(numpy.array(model.run(image=image.numpy())["output"])), expected, rtol=1e-4, atol=1e-5)


def test_other_code_in_the_same_folder(tmp_path: Path) -> None:
    """A process that loads what was exported over a library that it has loaded runs the new one; inputs in bfloat16 are bits, zeros among them."""
    x = torch.randn(3, 16).bfloat16()
    for activation in (nn.ReLU(), nn.Sigmoid()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), activation).to(torch.bfloat16)
        CompiledModel(program_of(model, x, {"input": {0: "batch"}})).export(tmp_path / "out")
        module = runner(tmp_path / "out")
        with torch.no_grad():
            expected = model(x).float()
        found = module.Model(tmp_path / "out").run(input_1=x.view(torch.uint16).numpy())["output"]
        torch.testing.assert_close(torch.from_numpy(numpy.array(found)), expected, rtol=1e-2, atol=1e-2)
    assert module.main([str(tmp_path / "out"), "--size", "batch=2"]) == 0


@pytest.mark.slow
def test_a_language_model_in_bfloat16(tmp_path: Path) -> None:
    """What runs are numbers of bfloat16; what is attended over, kept and given back is float32."""
    torch.manual_seed(0)
    model = Decoder().eval().to(torch.bfloat16)
    ids = torch.randint(0, 40, (2, 5))
    compiled = CompiledModel(program_of(model, ids, {"input_ids": {0: "batch", 1: "tokens"}}))
    compiled.export(tmp_path / "whole")
    compiled.export(tmp_path / "cached", cache=True)
    whole, cached = (runner(tmp_path / name).Model(tmp_path / name) for name in ("whole", "cached"))
    assert whole.manifest["reference"] == cached.manifest["reference"] == []
    assert cached.manifest["functions"]["decode"]["outputs"][0]["dtype"] == "float32"
    with torch.no_grad():
        expected = model(ids).float()
    found = torch.from_numpy(numpy.array(whole.run(input_ids=ids.numpy())["output"]))
    caches, past = cached.caches(2, 5), numpy.zeros(1, "int64")
    cached.run("prefill", input_ids=ids[:, :4].numpy(), past=past, **caches)
    last = torch.from_numpy(numpy.array(cached.run("decode", input_ids=ids[:, 4:].numpy(), past=past + 4, **caches)["logits"]))
    for one, wanted in ((found, expected), (last, expected[:, -1])):
        assert float((one - wanted).abs().max()) <= 1e-2 * float(expected.abs().max())


@pytest.mark.slow
def test_a_language_model_decodes_in_place(tmp_path: Path) -> None:
    model, program = decoder()
    CompiledModel(program).export(tmp_path / "out", cache=True)
    module = runner(tmp_path / "out")
    exported = module.Model(tmp_path / "out")
    ids = torch.randint(0, 40, (2, 5))
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert exported.generate(ids.numpy(), 6).tolist() == expected[:, 5:].tolist()
    caches = exported.caches(2, 5)
    exported.run("prefill", input_ids=ids.numpy(), past=numpy.zeros(1, "int64"), **caches)
    assert all(cache.any() for cache in caches.values())
    shifted = {name: numpy.zeros(cache.size + 1, "float32")[1:].reshape(cache.shape) for name, cache in caches.items()}
    for function, past in (("decode", -1), ("decode", 5), ("prefill", 1)):
        with pytest.raises(module.LibraryError, match="have room for these tokens after 0 to"):
            exported.run(function, input_ids=ids[:, : 1 if function == "decode" else 5].numpy(), past=numpy.array([past]), **caches)
    with pytest.raises(module.LibraryError, match="changed in place"):
        exported.run("prefill", input_ids=ids.numpy(), past=numpy.zeros(1, "int64"), **shifted)
    if shutil.which("make") and shutil.which("g++"):
        program_file = build_example(tmp_path / "cpp", host())
        said = example(program_file, tmp_path / "out", {"input_ids": ids[:1]}, tmp_path, more=["--generate", "6"], text=True)
        assert said.splitlines()[1] == " ".join(map(str, expected[0, 5:].tolist()))


@pytest.mark.slow
def test_a_language_model_of_transformers(tmp_path: Path) -> None:
    """Compiled with its own cache it is told how to become a library; done as told, it writes what transformers' generate() writes, of any length."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(3, 40, (2, 6))
    options: dict[str, Any] = {"recipe": sc.Pipeline.parse("pack()"), "dynamic": {"input_ids": {0: "batch", 1: "tokens"}}}
    with pytest.raises(ModelError, match=r'"use_cache": False.*cache=True'):
        sc.compile(model, {"input_ids": ids}, **options).export(tmp_path / "out", cache=True)
    sc.compile(model, {"input_ids": ids, "use_cache": False}, **options).export(tmp_path / "out", cache=True)
    exported = runner(tmp_path / "out").Model(tmp_path / "out")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert exported.generate(ids.numpy(), 9).tolist() == expected[:, 6:].tolist()
    assert exported.manifest["symbols"]["tokens"] == exported.manifest["symbols"]["capacity"] == [1, None]
