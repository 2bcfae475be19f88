"""Sites: exact counts and facts on the zoo of small models, and on a few shapes that the zoo does not have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from sparsify_compiler.capture import capture
from sparsify_compiler.errors import UnknownNameError
from sparsify_compiler.program import Site
from sparsify_compiler.sites import FINDERS, find_sites

COUNTS = {
    "bert": {"linear": 13, "attention": 2, "ffn": 2, "residual": 4},
    "mpnet": {"linear": 13, "attention": 2, "ffn": 2, "residual": 4},
    "llama": {"linear": 15, "attention": 2, "ffn": 2, "residual": 4},
    "gpt2": {"linear": 8, "attention": 2, "ffn": 2, "residual": 4},
    "mixtral": {"linear": 11, "attention": 2, "moe": 2, "residual": 4},
    "vit": {"linear": 13, "conv": 1, "attention": 2, "ffn": 2, "residual": 4},
    "whisper": {"linear": 32, "conv": 2, "attention": 6, "ffn": 4, "residual": 10},
    "efficientnet_lite": {"linear": 1, "conv": 13, "residual": 2},
    "repvgg": {"linear": 1, "conv": 6},
    "mixer": {"linear": 9, "conv": 1, "ffn": 4, "residual": 4},
}


def sites(name: str, kind: str) -> dict[str, Site]:
    """Path -> site of one kind."""
    return {site.path: site for site in find_sites(zoo.captured(name)[2], [kind])}


def found(module: nn.Module, *inputs: Tensor) -> list[Site]:
    return find_sites(capture(module.eval(), inputs))


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    program = zoo.captured(name)[2]
    all_sites = find_sites(program)
    assert Counter(site.kind for site in all_sites) == COUNTS[name]
    assert all_sites == find_sites(program.clone())
    assert len({(site.kind, site.path) for site in all_sites}) == len(all_sites)
    region = program.regions[""]
    for site in all_sites:
        assert all(region.node(node) for node in site.roles.values())


@pytest.mark.parametrize(("name", "path", "facts"), [
    ("bert", "encoder.layer.0.attention", {"heads": 4, "kv_heads": 4, "head_dim": 12, "mask": "tensor", "padding": True, "cross": False}),
    ("mpnet", "encoder.layer.1.attention.attn", {"heads": 4, "kv_heads": 4, "head_dim": 12, "mask": "tensor", "padding": True}),
    ("llama", "model.layers.1.self_attn", {"heads": 9, "kv_heads": 3, "head_dim": 4, "mask": "causal", "padding": True, "fused": False}),
    ("gpt2", "h.0.attn", {"heads": 4, "kv_heads": 4, "head_dim": 12, "mask": "causal", "padding": False, "fused": True}),
    ("mixtral", "model.layers.0.self_attn", {"heads": 4, "kv_heads": 2, "head_dim": 8, "mask": "causal"}),
    ("vit", "layers.0.attention", {"heads": 4, "mask": "none", "padding": False}),
    ("whisper", "encoder.layers.0.self_attn", {"mask": "none", "cross": False}),
    ("whisper", "decoder.layers.0.self_attn", {"mask": "causal", "cross": False}),
    ("whisper", "decoder.layers.1.encoder_attn", {"mask": "none", "cross": True}),
])
def test_attention(name: str, path: str, facts: dict[str, Any]) -> None:
    site = sites(name, "attention")[path]
    assert {key: site.facts[key] for key in facts} == facts
    assert set(site.roles) == {"q", "k", "v", "out", "attention"}


@pytest.mark.parametrize(("name", "path", "facts"), [
    ("bert", "encoder.layer.0", {"gated": False, "activation": "gelu", "in_features": 48, "hidden": 96, "out_features": 48}),
    ("llama", "model.layers.0.mlp", {"gated": True, "activation": "silu", "in_features": 36, "hidden": 96, "out_features": 36}),
    ("gpt2", "h.1.mlp", {"gated": False, "activation": "gelu", "hidden": 192}),
    ("mixer", "blocks.0.tokens", {"in_features": 16, "hidden": 24, "out_features": 16}),
    ("mixer", "blocks.1.channels", {"in_features": 32, "hidden": 64, "out_features": 32}),
    ("whisper", "decoder.layers.1", {"activation": "gelu", "hidden": 64}),
])
def test_ffn(name: str, path: str, facts: dict[str, Any]) -> None:
    site = sites(name, "ffn")[path]
    assert {key: site.facts[key] for key in facts} == facts
    assert ("gate" in site.roles) == site.facts["gated"]


def test_moe() -> None:
    found = sites("mixtral", "moe")
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found["model.layers.0.mlp"].facts == {"experts": 4, "top_k": 2, "hidden": 64}
    assert set(found["model.layers.0.mlp"].roles) == {"input", "router", "output"}


@pytest.mark.parametrize(("name", "norm"), [
    ("bert", "post"), ("mpnet", "post"), ("llama", "pre"), ("vit", "pre"), ("mixer", "pre"), ("efficientnet_lite", "none"),
])
def test_where_the_norm_stands(name: str, norm: str) -> None:
    assert {site.facts["norm"] for site in sites(name, "residual").values()} == {norm}


def test_conv_blocks() -> None:
    stem = sites("efficientnet_lite", "conv")["stem.0"]
    assert set(stem.roles) == {"op", "norm", "activation"}
    assert stem.facts["activation"] == "hardtanh"
    assert (stem.facts["kernel"], stem.facts["stride"], stem.facts["padding"]) == ((3, 3), (2, 2), (1, 1))
    depthwise = sites("efficientnet_lite", "conv")["blocks.1.body.3"]
    assert depthwise.facts["depthwise"]
    assert depthwise.facts["in_channels"] == depthwise.facts["out_channels"] == 48


def test_linears_of_a_tied_head_and_of_a_transposed_weight() -> None:
    head = sites("llama", "linear")["lm_head"]
    assert head.facts == {"in_features": 36, "out_features": 100, "bias": False, "weight": "model.embed_tokens.weight"}
    fused = sites("gpt2", "linear")["h.0.attn.c_attn"]
    assert fused.facts == {"in_features": 48, "out_features": 144, "bias": True, "weight": "h.0.attn.c_attn.weight"}


def test_in_regions_paths_are_those_of_the_model() -> None:
    ffns = sites("llama_cached", "ffn")
    assert list(ffns) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert ffns["model.layers.0.mlp"].region == "model.layers.0.mlp"
    assert len(sites("llama_cached", "linear")) == 15


def test_a_module_called_twice_makes_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(torch.relu(self.part(x)))

    paths = [site.path for site in found(Twice(), torch.randn(2, 4)) if site.kind == "linear"]
    assert paths == ["part", "part@1"]


def test_torch_multihead_attention() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    by_kind = {kind: [s for s in found(layer, torch.randn(2, 5, 32)) if s.kind == kind] for kind in FINDERS}
    assert [s.path for s in by_kind["linear"]] == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    (attention,) = by_kind["attention"]
    assert attention.facts["heads"] == attention.facts["kv_heads"] == 4
    assert attention.facts["fused"]
    assert by_kind["ffn"][0].facts["activation"] == "relu"


def test_fused_gate_and_up() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.down(nn.functional.silu(gate) * up)

    # both halves come from one linear, which two values are read from: the FFN's up and gate are the same node
    ffns = [site for site in found(Fused(), torch.randn(2, 8)) if site.kind == "ffn"]
    assert len(ffns) == 1
    assert ffns[0].facts["fused"]
    assert ffns[0].roles["up"] == ffns[0].roles["gate"]


def test_unknown_kind() -> None:
    with pytest.raises(UnknownNameError, match="did you mean linear"):
        find_sites(zoo.captured("mixer")[2], ["linaer"])
