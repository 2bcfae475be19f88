"""Small models with random weights and the operator structure of the real ones. Each function returns (model, example_inputs, dynamic).

Seeded, in eval mode, hidden sizes of 32 to 64 and two layers: an export takes a second or two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.capture import capture
from sparsify_compiler.program import Program

Zoo = tuple[nn.Module, dict[str, Any], dict[str, dict[int, str]]]
TEXT = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}
IMAGE = {"pixel_values": {0: "batch"}}


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="the transformers package is not installed")


def _ids(vocabulary: int = 100, batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def _text(length: int = 8) -> dict[str, Any]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": _ids(length=length), "attention_mask": mask}


def bert() -> Zoo:
    """Encoder, post-norm, GELU FFN."""
    t = _transformers()
    config = t.BertConfig(vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=96, max_position_embeddings=64)
    return _made(t.BertModel, config), _text(), TEXT


def mpnet() -> Zoo:
    """Encoder with a relative position bias; attention is written by hand."""
    t = _transformers()
    config = t.MPNetConfig(vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=96, max_position_embeddings=64)
    return _made(t.MPNetModel, config), _text(), TEXT


def llama() -> Zoo:
    """Decoder of SmolLM2's shape: GQA with 3 query heads a key head, SwiGLU, RMSNorm, rotary positions, tied embedding; no cache."""
    model, inputs, dynamic = llama_cached()
    return model, {**inputs, "use_cache": False}, dynamic


def llama_cached() -> Zoo:
    """The same, called with use_cache=True: a DynamicCache comes out, which export does not take."""
    t = _transformers()
    config = t.LlamaConfig(vocab_size=100, hidden_size=36, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3, intermediate_size=96,
                           max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return _made(t.LlamaForCausalLM, config), {**_text(), "use_cache": True}, TEXT


def gpt2() -> Zoo:
    """Decoder with Conv1D (weights stored transposed), one fused q-k-v projection."""
    t = _transformers()
    config = t.GPT2Config(vocab_size=100, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return _made(t.GPT2Model, config), {"input_ids": _ids(), "use_cache": False}, {"input_ids": TEXT["input_ids"]}


def mixtral() -> Zoo:
    """Decoder with mixture-of-experts FFNs: 4 experts, 2 a token."""
    t = _transformers()
    config = t.MixtralConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                             num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
    return _made(t.MixtralForCausalLM, config), {**_text(), "use_cache": False}, TEXT


def vit() -> Zoo:
    """Image encoder, pre-norm: patches by a convolution."""
    t = _transformers()
    config = t.ViTConfig(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    return _made(t.ViTModel, config), {"pixel_values": _noise(2, 3, 32, 32)}, IMAGE


def whisper() -> Zoo:
    """Speech encoder and decoder: conv1d front, self- and cross-attention."""
    t = _transformers()
    config = t.WhisperConfig(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                             encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
                             pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
                             begin_suppress_tokens=None)
    inputs = {"input_features": _noise(2, 8, 32), "decoder_input_ids": _ids(), "use_cache": False}
    return _made(t.WhisperModel, config), inputs, {"input_features": {0: "batch"}, "decoder_input_ids": TEXT["input_ids"]}


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    return model


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _lived_in(model: nn.Module) -> nn.Module:
    """BatchNorm statistics as after training: not zero and one."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return model.eval()


class InvertedResidual(nn.Module):
    """EfficientNet-lite's MBConv: expand, depthwise, project; residual where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body, self.skip = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """Stem, four inverted residuals (two with a skip), head, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        blocks = [(8, 8, 1, 1), (8, 12, 2, 6), (12, 12, 1, 6), (12, 16, 2, 6)]
        self.blocks = nn.Sequential(*(InvertedResidual(*block) for block in blocks))
        self.head = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True))
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        y: Tensor = self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return y


def efficientnet_lite() -> Zoo:
    """Conv net with depthwise convs, BatchNorm and ReLU6 in place."""
    torch.manual_seed(0)
    return _lived_in(EfficientNetLite()), {"x": _noise(2, 3, 32, 32)}, {"x": {0: "batch"}}


class RepVGGBlock(nn.Module):
    """Training-time RepVGG: 3x3, 1x1 and identity branches, each with BatchNorm, summed before ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.pointwise = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, 0, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        return torch.relu(y if self.identity is None else y + self.identity(x))


def repvgg() -> Zoo:
    """Three RepVGG blocks, the second with an identity branch, and a classifier."""
    torch.manual_seed(0)
    blocks = [RepVGGBlock(3, 8, 2), RepVGGBlock(8, 8, 1), RepVGGBlock(8, 16, 2)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return _lived_in(model), {"input": _noise(2, 3, 16, 16)}, {"input": {0: "batch"}}


class MixerBlock(nn.Module):
    """MLP-Mixer: an MLP over patches, then an MLP over channels, both pre-norm with a skip."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, patches))
        self.channels = nn.Sequential(nn.Linear(channels, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.channels(self.norm2(x))
        return y


class Mixer(nn.Module):
    """Patches by a convolution, two mixer blocks, mean over patches, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, 32), MixerBlock(16, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        y: Tensor = self.head(self.norm(x).mean(dim=1))
        return y


def mixer() -> Zoo:
    """MLP-Mixer."""
    torch.manual_seed(0)
    return Mixer().eval(), {"x": _noise(2, 3, 32, 32)}, {"x": {0: "batch"}}


class Branching(nn.Module):
    """Python control flow on data: cannot be exported whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.left = nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
        self.right = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y: Tensor = self.left(h) if float(x.sum()) > 0 else self.right(h)
        return y


def branching() -> Zoo:
    """Control flow on data; the example takes the left branch."""
    torch.manual_seed(0)
    return Branching().eval(), {"x": _noise(4, 16).abs()}, {"x": {0: "batch"}}


WHOLE: dict[str, Callable[[], Zoo]] = {f.__name__: f for f in (bert, mpnet, llama, gpt2, mixtral, vit, whisper, efficientnet_lite, repvgg, mixer)}


@functools.cache
def captured(name: str) -> tuple[nn.Module, dict[str, Any], Program]:
    """A model of the zoo, its example inputs and its Program, captured once a session. Not to be edited: clone() it."""
    model, inputs, dynamic = (WHOLE.get(name) or globals()[name])()
    return model, inputs, capture(model, inputs, dynamic)
