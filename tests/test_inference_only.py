"""Nobody gets wrong numbers without a word: gradients through kernels, other weights in their place, and signs that are not in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ModelError

MASKED = "mask_weights(structure='4x1', density=0.5)"
SPARSE = f"{MASKED} | pack() | lower(margin=-1000.0, rounds=1)"
REFUSED = "no gradients go through a compiled model"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32)).eval()


def compiled(model: nn.Module, **options: object) -> CompiledModel:
    made = sc.compile(model, (torch.randn(4, 32),), recipe=sc.Pipeline.parse(SPARSE), dynamic={"input": {0: "batch"}}, target="cpu", **options)
    assert made._kernels
    return made


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return compiled(net())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def test_a_call_that_forgets_no_grad_goes_on_and_its_backward_is_refused(model: CompiledModel, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    assert not expected.requires_grad
    for given in (x, x.clone().requires_grad_()):
        found = model(given)
        assert torch.equal(found, expected)
        assert found.requires_grad
        with pytest.raises(ModelError, match=REFUSED):
            found.sum().backward()
    found.add_(1).relu_()   # results are the caller's own
    with pytest.raises(ModelError, match=REFUSED):
        torch.autograd.functional.jacobian(model, x)


def test_a_frozen_model_lets_what_follows_train(x: Tensor) -> None:
    frozen, head = compiled(net()).requires_grad_(False), nn.Linear(32, 2)
    head(frozen(x)).sum().backward()
    assert head.weight.grad is not None
    with pytest.raises(ModelError, match=REFUSED):
        frozen(x.clone().requires_grad_()).sum().backward()


def test_a_graph_without_kernels_has_the_gradients_that_it_had(x: Tensor) -> None:
    plain = CompiledModel(sc.Pipeline.parse(MASKED).run(capture(net(), (x,))))
    plain(x).square().sum().backward()
    assert all(one.grad is not None for one in plain.parameters())


def test_parts_of_a_model_refuse_too(x: Tensor) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.cache = net(), {}

        def forward(self, x: Tensor, cache: object = None) -> tuple[Tensor, object]:
            return self.net(x) * float(x.sum() > -1e9), object()

    whole = sc.compile(Around().eval(), (x,), recipe=sc.Pipeline.parse(SPARSE), target="cpu")
    assert whole.program.skeleton is not None
    with pytest.raises(ModelError, match=REFUSED):
        whole(x)[0].sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad(lambda model, x: model(x).sum(), argnums=1), lambda model, x: torch.func.vmap(model)(x[None]),
                                       lambda model, x: torch.func.jvp(model, (x,), (x,))])
def test_transforms_are_refused(model: CompiledModel, x: Tensor, transform: Callable[..., object]) -> None:
    with pytest.raises(ModelError, match="cannot look into"):
        transform(model, x)


def test_forward_gradients_are_refused(model: CompiledModel, x: Tensor) -> None:
    with forward_ad.dual_level(), pytest.raises(ModelError, match=REFUSED):
        model(forward_ad.make_dual(x, x))


def test_under_torch_compile(model: CompiledModel, x: Tensor) -> None:
    torch._dynamo.reset()
    traced = torch.compile(model, backend="aot_eager")
    for given in (x, x.clone().requires_grad_()):
        found = traced(given)
        torch.testing.assert_close(found, model(given))
        with pytest.raises(ModelError, match=REFUSED):
            found.sum().backward()
    with torch.no_grad():
        assert not traced(x).requires_grad
        torch.testing.assert_close(traced(torch._neg_view(x)), model(-x))


def test_no_tensor_can_be_replaced(model: CompiledModel, x: Tensor) -> None:
    before = model(x)
    for names in (dict(model.named_parameters()), dict(model.named_buffers()), model.state_dict()):
        with pytest.raises(ModelError, match="cannot be replaced"):
            torch.func.functional_call(model, {name: torch.zeros_like(tensor) for name, tensor in names.items()}, (x,))
    layer = model.model.get_submodule("1")
    with pytest.raises(ModelError, match="cannot be replaced"):
        layer.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(ModelError, match="cannot be replaced"):
        nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert torch.equal(model(x), before)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), before)     # its own
    assert torch.equal(copy.deepcopy(model)(x), before)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), before)


def test_inputs_whose_sign_is_not_in_memory(x: Tensor) -> None:
    model = compiled(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).eval())    # the first to read x is a kernel
    lazy = torch._neg_view(x)
    for _ in range(2):      # the second call is known
        assert torch.equal(model(lazy), model(-x))
        assert not torch.equal(model(x), model(-x))


@pytest.mark.parametrize("split", [lambda z: z.conj().imag, lambda z: torch.view_as_real(z.conj().resolve_conj())[..., 1],
                                   lambda z: torch.view_as_real(z.conj().clone())[..., 1], lambda z: torch._neg_view(z.real),
                                   lambda z: torch._neg_view(z.abs())])
def test_conjugates_within_a_model(split: Callable[[Tensor], Tensor], x: Tensor) -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(split(torch.complex(x, x + 1)))

    model = Waves().eval()
    made = sc.compile(model, (x,), recipe=sc.Pipeline.parse(SPARSE), target="cpu")
    masked = instantiate(sc.Pipeline.parse(MASKED).run(capture(model, (x,))))
    torch.testing.assert_close(made(x), masked(x))
