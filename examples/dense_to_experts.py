"""A dense FFN becomes a mixture of experts: what dividing it costs, by router, and what training-free repair brings back.

    python examples/dense_to_experts.py

The network is trained on rows of eight kinds, so there is something to find: its neurons belong to kinds, and few of them matter in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparsify_compiler as sc

KINDS, WIDTH = 8, 32


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around eight centres, and what each kind makes of them: a map of its own."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    centres, maps = torch.randn(KINDS, WIDTH, generator=fixed), torch.randn(KINDS, WIDTH, WIDTH, generator=fixed) / WIDTH**0.5
    kind = torch.randint(KINDS, (count,), generator=drawn)
    x = 2 * centres[kind] + torch.randn(count, WIDTH, generator=drawn)
    return x, (x[:, None] @ maps[kind])[:, 0]


def trained() -> nn.Module:
    """A plain FFN of 256 neurons."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, WIDTH))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    x, y = rows(2048, 1)
    for _ in range(150):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    model = trained()
    calibration, (held_out, _) = [(rows(1024, 2)[0],)], rows(512, 3)

    def error(**options: object) -> float:
        """Of the output on rows that nothing was fitted to, relative to the dense network's."""
        text = ", ".join(f"{key}={value!r}" for key, value in options.items())
        divided, _ = sc.attach(model, calibration[0], sc.Pipeline.parse(f"split_experts({text})"), calibration=calibration)
        with torch.no_grad():
            return float((divided(held_out) - model(held_out)).norm() / model(held_out).norm())

    print(f"all experts: {error(density=1.0):.1e}")
    for router in ("oracle", "ridge", "mlp", "random"):
        errors = [error(density=0.5, partition="activity_kmeans", router=router, repair=repair) for repair in ("none", "mean", "least_squares")]
        print(f"half of the neurons, router {router:7}: " + "  ".join(f"{value:.3f}" for value in errors) + "   (repair none, mean, least_squares)")


if __name__ == "__main__":
    main()
