"""What is measured beside the peers: chains of Linear + ReLU, a BERT-like stack and MobileNetV1, each a plain module whose zeros are in its weights.

A case is its text: "4096x4096/128/16x1/0.1" is a chain of layers with 4096 outputs and 4096 inputs, 128 rows, kept in 16×1 blocks at density 0.1;
"bert/128/unstructured/0.2" a stack of 4 encoder layers at sequence 128; "mobilenet/1/unstructured/0.1" MobileNetV1, batch 1. A shape that is not
square alternates with its transpose, as the two linears of an FFN do. Several layers have weights of their own, so that caches are met as in a model.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import prune

from sparsify_compiler.passes.prune.structures._base import Structure

DTYPES = "PEER_DTYPES"   # in the environment of engines: which dtypes of ours and torch's forms are made, where not all

SHAPES = ("4096x4096", "11008x4096", "768x3072")
ROWS = (1, 16, 128, 512)
BLOCKS = ("fan_in", "4x1", "16x1", "32x1", "32x32")
KEPT = (("2:4", 0.5), *(("unstructured", d) for d in (0.3, 0.2, 0.1, 0.05)), *((s, d) for s in BLOCKS for d in (0.2, 0.1)))
CHAIN_BYTES = 256 << 20  # of the float32 weights of a chain, at most: above every cache of a small machine, below its memory many times over
LAYERS = 12              # of a chain, at most


@dataclass(frozen=True)
class Case:
    """One workload. rows is the rows of x of a chain, the sequence of a stack, the batch of a network."""

    model: str
    rows: int
    structure: str
    density: float

    @property
    def name(self) -> str:
        return f"{self.model}/{self.rows}/{self.structure}/{self.density:g}"

    @property
    def group(self) -> str:
        """Cases of one group have the same dense form."""
        return f"{self.model}/{self.rows}"

    @property
    def is_chain(self) -> bool:
        """Is it nothing but Linear and ReLU?"""
        return self.model not in ("bert", "mobilenet")

    @staticmethod
    def parse(text: str) -> Case:
        """The inverse of `name`."""
        model, rows, structure, density = text.split("/")
        return Case(model, int(rows), structure, float(density))


def names() -> list[str]:
    """Every case that --cases selects from."""
    chains = [Case(shape, rows, *kept) for shape in SHAPES for rows in ROWS for kept in (*KEPT, ("dense", 1.0))]
    stacks = [Case("bert", 128, structure, d) for structure in ("unstructured", *BLOCKS) for d in (0.2, 0.1)]
    networks = [Case("mobilenet", 1, structure, d) for structure in ("unstructured", "16x1") for d in (0.25, 0.1)]
    return [case.name for case in (*chains, *stacks, *networks)]


def build(case: Case) -> tuple[nn.Module, Tensor, int]:
    """(the model in evaluation mode, an input, how many layers a chain has, else 1). The same in every process."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    if case.model == "bert":
        return _cut(nn.Sequential(*(Encoder() for _ in range(4))), case, nn.Linear), torch.randn(1, case.rows, 768), 1
    if case.model == "mobilenet":
        return _cut(mobilenet_v1(), case, nn.Conv2d), torch.randn(case.rows, 3, 224, 224), 1
    shapes = list(_chain(case.model))
    layers = [part for n, k in shapes for part in (nn.Linear(k, n), nn.ReLU())]
    return _cut(nn.Sequential(*layers), case, nn.Linear), torch.randn(case.rows, shapes[0][1]), len(shapes)


def restore(case: Case, folder: Path) -> tuple[nn.Module, Tensor]:
    """The model and the input that `export` wrote into the folder, in memory of their own. Drawing large weights anew would take seconds."""
    if not case.is_chain:
        return build(case)[:2]
    parts: list[nn.Module] = []
    for i in range(len(list(folder.glob("weight-*.npy")))):
        weight, bias = (torch.from_numpy(np.load(folder / f"{name}-{i}.npy")) for name in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts).eval(), torch.from_numpy(np.load(folder / "x.npy"))


def masked(model: nn.Module) -> nn.Module:
    """The same model, the zeros of each cut layer in a mask of its own, as torch.nn.utils.prune writes it: what our compiler takes."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and bool((layer.weight == 0).any()):
            prune.custom_from_mask(layer, "weight", layer.weight != 0)
    return model


def export(case: Case, folder: Path) -> None:
    """Write model.onnx, x.npy, expected.npy and case.json; of a chain weight-<i>.npy and bias-<i>.npy too."""
    model, x, layers = build(case)
    with torch.inference_mode():
        np.save(folder / "expected.npy", model(x).numpy())
    np.save(folder / "x.npy", x.numpy())
    for i, layer in enumerate(layer for layer in model.children() if isinstance(layer, nn.Linear) and case.is_chain):
        np.save(folder / f"weight-{i}.npy", layer.weight.detach().numpy())
        np.save(folder / f"bias-{i}.npy", layer.bias.detach().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that older engines can read is deprecated
        torch.onnx.export(model, (x,), str(folder / "model.onnx"), opset_version=14, dynamo=False)
    (folder / "case.json").write_text(json.dumps({"case": case.name, "layers": layers}))


def _chain(shape: str) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of each layer."""
    n, k = map(int, shape.split("x"))
    pair = ((n, k), (k, n))
    for _ in range(max(1, min(LAYERS, CHAIN_BYTES // (4 * n * k)) // 2)):
        yield from pair


def _cut(model: nn.Module, case: Case, kind: type[nn.Module]) -> nn.Module:
    """Zero what a random score does not keep, and scale up what is left, so that activations neither die nor explode.

    Of convolutions only the pointwise ones that read more than an image.
    """
    for layer in model.modules():
        if not isinstance(layer, kind):
            continue
        weight = layer.weight.data
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups > 1):
            nn.init.kaiming_normal_(weight)
            continue
        fan_in = weight[0].numel()
        weight.normal_(0, (2 / fan_in / case.density) ** 0.5)
        if case.structure != "dense":
            weight[~Structure.parse(case.structure).mask(torch.rand_like(weight), case.density)] = 0
    return model.eval()


class Encoder(nn.Module):
    """An encoder layer of BERT-base: 768 wide, 12 heads, FFN of 3072, norms after the residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(768, 768) for _ in range(4))
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)
        self.first, self.second = nn.LayerNorm(768), nn.LayerNorm(768)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(1, -1, 12, 64).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 768)
        x = self.first(x + self.out(mixed))
        return self.second(x + self.down(self.gelu(self.up(x))))


def mobilenet_v1() -> nn.Sequential:
    """MobileNetV1 (arXiv:1704.04861, table 1), 224×224, width 1, its norms folded, with a linear classifier that stays dense."""
    widths = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), *((512, 512, 1),) * 5, (512, 1024, 2),
              (1024, 1024, 1))
    parts: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
    for given, made, stride in widths:
        parts += [nn.Conv2d(given, given, 3, stride, 1, groups=given), nn.ReLU(), nn.Conv2d(given, made, 1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))
