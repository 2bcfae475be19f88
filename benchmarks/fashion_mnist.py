"""Fashion-MNIST, small networks whose structure collapses, and their training; trained weights are kept, so that a second run starts at once.

The data are the gzip'ed IDX files of Debian's package dataset-fashion-mnist (MIT licence): 60,000 images of 28×28 to train on, 10,000 to test.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it
CLASSES = 10


class AbsentError(Exception):
    """The data set is not on this machine."""


@dataclass(frozen=True)
class Images:
    """Pixels float32 [n, 1, 28, 28], with mean 0 and deviation 1 over the training set, and labels int64 [n]."""

    pixels: Tensor
    labels: Tensor


def images(part: str, folder: Path = FOLDER, limit: int | None = None) -> Images:
    """The "train" or "t10k" part. Raises AbsentError."""
    pixels, labels = (folder / f"{part}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1"))
    for file in (pixels, labels):
        if not file.is_file():
            raise AbsentError(f"{file} is missing: apt-get install dataset-fashion-mnist, or name the folder with --data")
    values = _idx(pixels)[:limit].float().div(255).sub(0.2860).div(0.3530)
    return Images(values.unsqueeze(1), _idx(labels)[:limit].long())


def _idx(file: Path) -> Tensor:
    data = gzip.decompress(file.read_bytes())
    dims = data[3]
    shape = struct.unpack(f">{dims}I", data[4:4 + 4 * dims])
    return torch.frombuffer(bytearray(data[4 + 4 * dims:]), dtype=torch.uint8).reshape(shape)


class RepVGGBlock(nn.Module):
    """3×3, 1×1 and, where the shape stays, identity, each with its norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.pointwise = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        return functional.relu(y if self.identity is None else y + self.identity(x))


def repvgg(wider: int = 1) -> nn.Module:
    """Six RepVGG blocks, two of which halve the image: 73 thousand parameters when collapsed, or `wider`² times as many."""
    plan = ((1, 16, 2), (16, 16, 1), (16, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    blocks = (RepVGGBlock(max(1, inputs // 16 * 16 * wider), outputs * wider, stride) for inputs, outputs, stride in plan)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64 * wider, CLASSES))


class Ffn(nn.Module):
    """A transformer's FFN with its shortcut: plain, or as RePaViT trains it, with `idle` channels past the activation and norms of the batch."""

    def __init__(self, width: int, idle: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.active = hidden - idle
        self.norm: nn.Module = nn.BatchNorm1d(width) if idle else nn.LayerNorm(width)
        self.norm2 = nn.BatchNorm1d(hidden) if idle else None
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm2 is None:
            return x + self.fc2(functional.gelu(self.fc1(self.norm(x))))
        h = self.fc1(_over_tokens(self.norm, x))
        h = torch.cat([functional.gelu(h[..., :self.active]), h[..., self.active:]], -1)
        return x + self.fc2(_over_tokens(self.norm2, h))


def _over_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """A BatchNorm over the channels of [batch, tokens, channels]."""
    return norm(x.flatten(0, 1)).reshape(x.shape)


class Attention(nn.Module):
    """Self-attention with its norm and shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Patches of 4×4 pixels, pre-norm blocks, mean over the patches. `theta` is the share of idle FFN channels: 0 is the dense twin."""

    def __init__(self, theta: float, width: int = 48, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 49, width))
        layers = ((Attention(width, heads), Ffn(width, round(4 * width * theta))) for _ in range(depth))
        self.blocks = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT + self.places)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"repvgg": repvgg, "vit": lambda: ViT(0.0), "repavit": lambda: ViT(0.75)}


def trained(name: str, data: Images, epochs: int, cache: Path, say: Callable[[str], object] = lambda text: None) -> nn.Module:
    """The network in eval mode with trained weights, from the cache where it was trained so before."""
    torch.manual_seed(0)
    model = MODELS[name]()
    key = hashlib.sha256(f"{model} {epochs} {len(data.labels)} {_RECIPE}".encode()).hexdigest()[:12]
    file = cache / f"{name}-{key}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    start = time.perf_counter()
    train(model, data, epochs)
    say(f"{name}: trained {epochs} epochs in {time.perf_counter() - start:.0f} s")
    cache.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model.eval()


_RECIPE = "AdamW 3e-3, one cycle, weight decay 0.05, batches of 128, flips"


def train(model: nn.Module, data: Images, epochs: int) -> None:
    """AdamW with a warm-up and a cosine; half of the images mirrored."""
    steps = epochs * math.ceil(len(data.labels) / 128)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(128):
            pixels = data.pixels[chosen]
            mirrored = torch.rand(len(chosen), generator=generator) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
            loss = functional.cross_entropy(model(pixels), data.labels[chosen], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def logits(model: nn.Module, data: Images, batch: int = 500) -> Tensor:
    """What a model says about every image: [n, 10]."""
    with torch.inference_mode():
        return torch.cat([model(pixels) for pixels in data.pixels.split(batch)])


def accuracy(scores: Tensor, data: Images) -> float:
    """Share of images whose highest score is their label's."""
    return float((scores.argmax(1) == data.labels).double().mean())
