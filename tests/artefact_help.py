"""What the tests of artefacts share: small compiled models, and edits that keep every hash right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify_compiler.artefact_manifest import MANIFEST, write_manifest
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel

REWRITTEN = ("format", "version", "versions", "files", "digest")


class Structured(nn.Module):
    """Dictionaries in and out, a None, a size and a bool among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, batch: dict[str, torch.Tensor], scale: float | None = None) -> dict[str, Any]:
        hidden = self.norm(torch.relu(self.up(batch["x"])))
        return {
            "out": self.down(hidden) * (1.0 if scale is None else scale),
            "more": (hidden.masked_fill(hidden < 0, float("-inf")), hidden.shape[0]),
        }


def structured() -> tuple[CompiledModel, dict[str, Any]]:
    """A traced model with a dynamic dimension, and a call of it with another size."""
    torch.manual_seed(0)
    program = capture(Structured().eval(), {"batch": {"x": torch.randn(3, 8)}, "scale": 0.5}, {"batch": {0: "rows"}})
    return CompiledModel(program), {"batch": {"x": torch.randn(5, 8)}, "scale": 0.5}


class Attention(nn.Module):
    """Two dynamic dimensions, views and products of them: what an encoder's graph is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        q, k, v = self.mix(self.embed(ids)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        return self.out(heads.transpose(1, 2).reshape(batch, length, 8))


def attention() -> tuple[CompiledModel, dict[str, Any]]:
    """A small encoder with two dynamic dimensions, and a call of other sizes."""
    torch.manual_seed(0)
    names = {0: "batch", 1: "seq"}
    example = {"ids": torch.randint(0, 16, (2, 128)), "mask": torch.ones(2, 128, dtype=torch.long)}
    program = capture(Attention().eval(), example, {"ids": names, "mask": names})
    return CompiledModel(program), {"ids": torch.randint(0, 16, (3, 7)), "mask": torch.ones(3, 7, dtype=torch.long)}


def small() -> CompiledModel:
    """The smallest model that there is: one linear layer."""
    torch.manual_seed(0)
    return CompiledModel(capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),)))


def reseal(folder: Path) -> None:
    """Write the manifest again after an edit, as an attacker would."""
    facts = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    write_manifest(folder, {key: value for key, value in facts.items() if key not in REWRITTEN})


def edit_graph(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change graph.json and make all hashes right again."""
    graph = json.loads((folder / "graph.json").read_text())
    edit(graph)
    (folder / "graph.json").write_text(json.dumps(graph))
    reseal(folder)


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change facts of the manifest and make its own digest right again."""
    from sparsify_compiler.artefact_manifest import _digest

    facts = json.loads((folder / MANIFEST).read_text()) | changes
    facts["digest"] = _digest(facts)
    (folder / MANIFEST).write_text(json.dumps(facts))
