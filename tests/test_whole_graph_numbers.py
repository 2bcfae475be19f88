"""What is no number says in libraries what it says in torch, whichever operator meets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.capture import capture
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import host
from sparsify_compiler.whole_call import build_call

OPERATORS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "clamp": lambda x: x.clamp(-0.5, 0.5), "at least": lambda x: x.clamp(min=0.1), "at most": lambda x: x.clamp(max=0.1),
    "bounds": lambda x: torch.clamp(torch.ones_like(x), min=-1 - x.abs(), max=x), "half": lambda x: x.bfloat16().clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)), "minimum": lambda x: torch.minimum(x, x.flip(-1)),
    "amax": lambda x: x.amax(-1), "amin": lambda x: x.amin(0), "half's": lambda x: x.bfloat16().amax(-1), "all": lambda x: x.max(),
    "max": lambda x: x.max(-1), "min": lambda x: x.min(-1, keepdim=True), "argmax": lambda x: x.argmax(-1), "argmin": lambda x: x.argmin(),
    "top": lambda x: x.topk(3), "least": lambda x: x.topk(3, largest=False), "order": lambda x: x.argsort(-1, descending=True),
    "pool": lambda x: functional.max_pool2d(x.view(1, 1, 4, 16), 3, 2, 1), "elu": functional.elu, "celu": functional.celu,
    "normalised": lambda x: functional.normalize(x, dim=-1), "softshrink": functional.softshrink, "floor": lambda x: x // -0.3,
    "unlike 0": lambda x: x != 0, "unlike": lambda x: x != x.flip(-1), "unlike itself": lambda x: x != x, "itself": lambda x: x == x,
    "half itself": lambda x: (x.bfloat16() + 1) == (x.bfloat16() + 1),
    "not at most": lambda x: torch.logical_not(x <= 0), "not above": lambda x: torch.where(~(x > 0), x, 3.0), "equal": lambda x: x == x.amax(),
    "count": lambda x: (x != 0).sum(-1), "xor": lambda x: torch.logical_xor(x, x.flip(-1)), "half unlike": lambda x: x.bfloat16() != 0}


class Every(nn.Module):
    """All of them, of one input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        results = [operator(x * 2) for operator in OPERATORS.values()]
        return [one for result in results for one in (result if isinstance(result, tuple) else (result,))]


def test_what_is_no_number() -> None:
    model = Every().eval()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    library, _ = build_call(capture(model, (x,)), host(), {})
    broken = x.clone()
    broken[0, 3] = broken[1, 0] = broken[1, 9] = torch.nan
    broken[0, 7], broken[2, 15], broken[2, 2], broken[3, 5], broken[3, 6] = torch.inf, torch.inf, -torch.inf, 0.0, -0.0
    names = [name for name, operator in OPERATORS.items() for _ in (range(2) if isinstance(operator(x), tuple) else range(1))]
    for given in (x, broken):
        for name, expected, found in zip(names, model(given), library.run(given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("operator", [lambda x: x.median(-1).values, lambda x: torch.atan2(x, x + 1), lambda x: x.argmax(0)])
def test_what_no_library_says_is_refused(operator: Callable[[Tensor], Tensor]) -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operator(x)

    with pytest.raises(KernelError, match="whole graphs"):
        build_call(capture(One().eval(), (torch.randn(4, 16),)), host(), {})
