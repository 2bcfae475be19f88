"""Quality: distances that are right on cases one can work out, and metrics that are refused."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.errors import InputError
from sparsify_compiler.quality import measure, output_distance


class Scaled(nn.Module):
    """Two outputs: one scaled, one turned by 60 degrees, and an integer that does not count."""

    def __init__(self, scale: float, angle: float) -> None:
        super().__init__()
        self.scale, self.angle = scale, angle

    def forward(self, x: Tensor) -> Any:
        turned = torch.tensor([math.cos(self.angle), math.sin(self.angle)]).expand(x.shape[0], 2)
        return OrderedDict(scaled=x * self.scale, turned=turned, index=x.argmax(-1))


def test_distances() -> None:
    batches = [(torch.ones(2, 4),), (torch.ones(3, 4),)]
    scaled, turned = output_distance(Scaled(1, 0), Scaled(3, math.pi / 3), batches)
    assert (scaled.name, turned.name) == ("scaled", "turned")
    assert scaled.cosine == pytest.approx(1)
    assert scaled.relative_error == pytest.approx(2)
    assert scaled.max_error == pytest.approx(2)
    assert turned.cosine == pytest.approx(0.5)


def test_outputs_without_numbers_have_not_moved() -> None:
    for model, x in ((nn.Linear(4, 0), torch.randn(3, 4)), (nn.Linear(4, 2), torch.randn(0, 4))):
        (found,) = output_distance(model, model, [(x,)])
        assert (found.cosine, found.relative_error, found.max_error) == (1.0, 0.0, 0.0)


def test_equal_zero_and_nan() -> None:
    same = output_distance(nn.Identity(), nn.Identity(), [{"input": torch.zeros(2, 3)}])
    assert [(d.name, d.cosine, d.relative_error, d.max_error) for d in same] == [("output", 1.0, 0.0, 0.0)]
    broken = output_distance(nn.Identity(), Lambda(lambda x: x * float("nan")), [(torch.ones(2, 3),)])[0]
    assert math.isnan(broken.cosine)
    assert math.isnan(broken.max_error)
    assert math.isnan(broken.relative_error)


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(("batches", "other"), [([], nn.Identity()), ([torch.ones(2)], nn.Identity()), ([(torch.ones(2),)], Lambda(lambda x: x[:1])),
                                                ([(torch.ones(2),)], Lambda(lambda x: (x, x)))])
def test_refusals(batches: Any, other: nn.Module) -> None:
    with pytest.raises(InputError):
        output_distance(nn.Identity(), other, batches)


@pytest.mark.parametrize("value", [0.5, 1, torch.tensor(0.25), torch.tensor([2.0]), torch.ones(3).mean().numpy()])
def test_measure_takes_numbers(value: Any) -> None:
    result = measure(lambda model: value, nn.Identity())
    assert type(result) is float
    assert result == pytest.approx(float(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None, torch.ones(2), True, {"accuracy": 1.0}])
def test_measure_refuses(value: Any) -> None:
    with pytest.raises(InputError, match="quality"):
        measure(lambda model: value, nn.Identity())


def test_measure_refuses_what_is_no_function_and_lets_errors_through() -> None:
    with pytest.raises(InputError):
        measure(0.5, nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        measure(lambda model: 1 / 0, nn.Identity())
