"""Targets and ignores as text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_compiler.capture import capture
from sparsify_compiler.errors import SelectorError
from sparsify_compiler.program import Program, Site
from sparsify_compiler.selectors import select
from sparsify_compiler.sites import find_sites

SITES = [Site("linear", f"encoder.layer.{i}.{part}", "", {"op": f"{part}_{i}"}) for i in range(3) for part in ("query", "out.dense")]
SITES += [Site("ffn", "encoder.layer.0", "", {}), Site("conv", "stem", "", {"op": "stem"})]


def paths(*args: object) -> list[str]:
    return [site.path for site in select(SITES, *args)]


@pytest.mark.parametrize(("selector", "expected"), [
    ("encoder.layer.1.query", ["encoder.layer.1.query"]),
    ("encoder.layer.*.query", [f"encoder.layer.{i}.query" for i in range(3)]),
    ("**.dense", [f"encoder.layer.{i}.out.dense" for i in range(3)]),
    ("encoder.layer.[01].query", ["encoder.layer.0.query", "encoder.layer.1.query"]),
    (r"re:encoder\.layer\.[12]\.query", ["encoder.layer.1.query", "encoder.layer.2.query"]),
    ("conv", ["stem"]),
    ("ffn", ["encoder.layer.0"]),
])
def test_forms(selector: str, expected: list[str]) -> None:
    assert paths(selector) == expected
    assert paths((selector,)) == expected
    assert paths((), selector) == [s.path for s in SITES if s.path not in expected]


def test_everything_without_targets_and_in_the_sites_own_order() -> None:
    assert paths() == [s.path for s in SITES]
    assert paths(("stem", "encoder.layer.0.query")) == ["encoder.layer.0.query", "stem"]
    assert paths("linear", "*.query") == [f"encoder.layer.{i}.out.dense" for i in range(3)]


def test_a_regular_expression_must_match_the_whole_path() -> None:
    with pytest.raises(SelectorError):
        paths(r"re:layer\.1")


@pytest.mark.parametrize(("selector", "wrong"), [
    ("encoder.layer.1.qurey", "did you mean encoder.layer.1.query"),
    ("encoder.layer.1", "2 sites lie below it: write encoder.layer.1.*"),
    ("linaer", "did you mean linear"),
    ("*.nothing", "matches none of 8 sites"),
    ("re:(", "not a regular expression"),
])
def test_what_matches_nothing_offers_the_nearest(selector: str, wrong: str) -> None:
    for args in ((selector,), ((), selector)):
        with pytest.raises(SelectorError) as caught:
            paths(*args)
        assert wrong in str(caught.value)


class Parts(nn.Module):
    """Captured in parts, for there is Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y if float(y.sum()) < 1e9 else -y)  # type: ignore[no-any-return]


def test_a_kind_of_which_there_is_none_is_not_offered() -> None:
    program = capture(Parts().eval(), (torch.randn(2, 4),))
    sites = find_sites(program)
    with pytest.raises(SelectorError, match=r"(?s)'attention' matches none of 2 sites.*there are linear; what lies between the parts") as refused:
        select(sites, "attention", program=program)
    assert "did you mean" not in str(refused.value)
    whole = capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    with pytest.raises(SelectorError, match=r"there are linear$"):
        select(find_sites(whole), "attention", program=whole)


def test_module_classes_and_ops() -> None:
    torch.manual_seed(0)
    program: Program = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval(), (torch.randn(1, 3, 2, 2),))
    names = {str(n.target): n.name for _, n in program.nodes()}
    sites = [Site("conv", "0", "", {"op": names["aten.conv2d.default"]}), Site("linear", "2", "", {"op": names["aten.linear.default"]})]
    for selector, expected in (("Linear", "2"), ("Conv2d", "0"), ("aten.linear", "2"), ("aten.conv2d.default", "0")):
        assert [s.path for s in select(sites, selector, (), program)] == [expected]
    with pytest.raises(SelectorError):
        select(sites, "Linear")
