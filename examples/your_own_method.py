"""A new method in one file: a rewrite rule with its pass, and a recipe that composes it with what is there.

    python examples/your_own_method.py

To make both known by name (`sparsify passes`, "… | absorb_scale() | …"), move the pass to passes/<group>/absorb_scale.py and the recipe to
passes/recipes/scaled_magnitude.py, or put them in a package of your own with the same folders and an entry point of the group
"sparsify_compiler.plugins". No list has to be edited: the file tree is the registry, and the law suite then tests both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

import sparsify_compiler as sc


class ScaleIntoLinear(sc.Rule):
    """linear(x, w, b) * s = linear(x, w * s, b * s). Written as the formula: the engine matches it, runs `w * s` once and stores the result."""

    params = ("w", "b", "s")  # what must depend on parameters alone

    @staticmethod
    def pattern(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return linear(x, w, b) * s

    def check(self, m: sc.Match) -> sc.Miss | None:
        return None if m.s.numel() == 1 else sc.Miss(f"needs a single scale, got {tuple(m.s.shape)}")

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return linear(x, w * s, b * s)


@dataclass(frozen=True)
class AbsorbScale(sc.RulePass):
    """Absorb a learned scale behind a linear layer into its weight and bias.

    Matches    linear(x, w, b) * s
    Rewrites   linear(x, w * s, b * s)
    Preserves  values, up to float reassociation
    Paper      none: algebra
    """

    def rules(self) -> tuple[sc.Rule, ...]:
        return (ScaleIntoLinear(),)


def scaled_magnitude(structure: str = "16x1") -> sc.Pipeline:
    """Magnitude pruning that sees the weights as they act, learned scales included."""
    return AbsorbScale() | sc.recipes.magnitude(structure=structure)


class Scaled(torch.nn.Module):
    """Two linear layers, each with a learned scale behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(256, 512), torch.nn.Linear(512, 256)
        self.scales = torch.nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x) * self.scales[0])) * self.scales[1]


def main() -> None:
    model, x = Scaled().eval(), torch.randn(32, 256)
    compiled = sc.compile(model, (x,), recipe=scaled_magnitude(), budget=sc.Budget(density=0.2))
    print(compiled.report())
    print("the same as text, to write into a file:", scaled_magnitude())


if __name__ == "__main__":
    main()
