"""The check that torch.compile reads is the one that every other call meets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.call import CapturedModule, Flattener, instantiate
from sparsify_compiler.call_check import literal_check
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import InputError


class Two(nn.Module):
    """Two inputs that share a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) + y


@pytest.fixture(scope="module")
def module() -> CapturedModule:
    made = instantiate(capture(Two().eval(), (torch.randn(3, 4), torch.randn(3, 4)), {"x": {0: "rows"}, "y": {0: "rows"}}))
    assert isinstance(made, CapturedModule)
    return made


CALLS = [((torch.randn(n, 4), torch.randn(m, 4).to(dtype)), n == m and dtype is torch.float32)
         for n, m, dtype in ((3, 3, torch.float32), (5, 5, torch.float32), (3, 2, torch.float32), (3, 3, torch.float64))]
CALLS += [((torch.randn(0, 4), torch.randn(0, 4)), False)]  # a batch of none is below what was captured
CALLS += [((torch.randn(3, 5), torch.randn(3, 4)), False), ((torch.randn(3, 1, 4), torch.randn(3, 4)), False), ((torch.randn(3, 4), 1.0), False)]


@pytest.mark.parametrize(("args", "right"), CALLS)
def test_it_lets_through_what_a_flattener_does(module: CapturedModule, args: tuple[Tensor, ...], right: bool) -> None:
    fits = literal_check(module._spec, torch.device("cpu"))
    assert fits is not None
    assert fits(args, {}) == right
    assert not fits(args[:1], {"y": args[1]}), "names are a flattener's work"
    if right:
        assert Flattener(module._spec)(args, {}) == list(args)
    else:
        with pytest.raises(InputError):
            Flattener(module._spec)(args, {})


def test_a_constant_among_the_inputs_has_none() -> None:
    class Flag(nn.Module):
        def forward(self, x: Tensor, twice: bool) -> Tensor:
            return x + x if twice else x

    spec = capture(Flag().eval(), (torch.randn(2), True)).regions[""].spec
    assert literal_check(spec, None) is None


def test_torch_compile_reads_nothing_else_of_the_call(module: CapturedModule) -> None:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    def call(x: Tensor, y: Tensor) -> Tensor:
        return module(x, y) * 2  # type: ignore[no-any-return]

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(call, backend="eager")
    torch.testing.assert_close(compiled(x, y), call(x, y))
    (entry,) = _debug_get_cache_entry_list(call.__code__)
    assert "_flatten" not in str(entry.guard_manager)
    with pytest.raises(InputError):
        compiled(x, torch.randn(2, 4))
    torch.testing.assert_close(torch.compile(lambda x, y: module(y=y, x=x), backend="eager")(x, y), module(x, y))
