"""Packed layers in training: kernels against their meaning, training as with masks, moving places, saving, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.errors import InputError
from sparsify_compiler.formats._base import Format
from sparsify_compiler.operands import PACKED
from sparsify_compiler.packed import Packed
from sparsify_compiler.training import Hook

X = torch.randn(40, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
FORMATS: dict[str, tuple[str, dict[str, int]]] = {
    "csr": ("csr", {}), "bitmap": ("bitmap", {}), "condensed": ("condensed", {}), "1:4": ("nm", {"n": 1, "m": 4}), "16x1": ("bsr", {"r": 16, "c": 1}),
    "32x1": ("bsr", {"r": 32, "c": 1}), "4x1": ("bsr", {"r": 4, "c": 1}), "3x2": ("bsr", {"r": 3, "c": 2}),
}


def stored(name: str, outputs: int, inputs: int, density: float, dtype: torch.dtype = torch.float32) -> Format:
    kind, sizes = FORMATS[name]
    r, c = sizes.get("r", 1), sizes.get("c", 1)
    if name in ("condensed", "1:4"):
        m = 4 if name == "1:4" else inputs
        kept = 1 if name == "1:4" else int(inputs * density)
        noise = torch.rand(outputs, inputs // m, m)
        mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(2, noise.topk(kept, 2).indices, True).view(outputs, inputs)
    else:
        mask = (torch.rand(-(-outputs // r), inputs // c) < density).repeat_interleave(r, 0)[:outputs].repeat_interleave(c, 1)
    made: Format = catalog.get("format", kind).encode(torch.randn(outputs, inputs, dtype=dtype), mask, **sizes)
    return made


def layer_of(form: Format) -> Packed:
    return Packed(f"linear_{form.name()}", type(form), form.tensors(), form.attributes(), True)


def gradients(layer: Packed, x: Tensor, bias: Tensor, up: Tensor) -> list[Tensor]:
    """y, and the gradients of x, values and bias."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = layer(x, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.values, bias), up)]


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), rows=st.sampled_from([1, 5, 16, 33, 130]), outputs=st.sampled_from([1, 7, 16, 37, 64]),
       inputs=st.sampled_from([4, 36, 132]), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 9))
def test_kernels_compute_what_the_dense_layer_does(name: str, rows: int, outputs: int, inputs: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    form = stored(name, outputs, inputs, density)
    layer, bias = layer_of(form), torch.randn(outputs, dtype=torch.float32)
    x, up = torch.randn(inputs, rows, dtype=torch.float32).T, torch.randn(rows, 2 * outputs, dtype=torch.float32)[:, ::2]  # neither is contiguous
    found = gradients(layer, x, bias, up)
    assert (layer._bound is not None and layer._bound[1] is not None) == bool(form.values.numel())
    wide = form.decode().double()
    dense = up.double().T @ x.double()
    expected = [x.double() @ wide.T + bias.double(), up.double() @ wide, form.gather(dense), up.double().sum(0)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["csr", "condensed", "3x2"])
def test_gradcheck(name: str) -> None:
    """In float64 it is the op, whose gradients are those that the kernels were compared with."""
    torch.manual_seed(0)
    form = stored(name, 6, 8, 0.5, torch.float64)
    layer = layer_of(form)
    x, bias = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"values": values}, (x, bias))
        return y

    values = form.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, values, bias))


def test_no_number_reaches_what_does_not_keep_it() -> None:
    torch.manual_seed(0)
    form = stored("16x1", 32, 40, 0.3)
    kept = form.mask()
    x = torch.randn(20, 40, dtype=torch.float32)
    x[3, 5] = torch.nan
    y = layer_of(form)(x)
    assert torch.equal(y.isnan(), (torch.arange(20)[:, None] == 3) & kept[:, 5])
    up = torch.ones(20, 32, dtype=torch.float32)
    up[4, 17] = torch.inf
    for_x = gradients(layer_of(form), torch.randn(20, 40, dtype=torch.float32), torch.zeros(32, dtype=torch.float32), up)[1]
    assert torch.equal(~for_x.isfinite(), (torch.arange(20)[:, None] == 4) & kept[17])


def test_what_has_no_kernel_is_the_op() -> None:
    form = stored("csr", 8, 12, 0.5)
    layer = layer_of(form)
    assert layer(torch.randn(0, 12, dtype=torch.float32)).shape == (0, 8)
    assert layer(torch.randn(2, 3, 12, dtype=torch.float64)).dtype == torch.float64
    assert layer._bound is None
    half = torch.randn(2, 3, 12, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(half), functional.linear(half.float(), form.decode()).bfloat16(), rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match=r"needs \[..., 12\]"):
        layer(torch.randn(2, 11, dtype=torch.float32))


class Net(nn.Module):
    """Two layers of which the first runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(functional.relu(self.first(functional.relu(self.first(x)))))
        return y


def attached(recipe: str, frozen: bool = False) -> tuple[nn.Module, Hook]:
    torch.manual_seed(0)
    net = Net().eval()
    net.last.weight.requires_grad_(not frozen)
    return sc.attach(net, (X,), recipe)


def train(module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = functional.mse_loss(module(X), Y) + hook.loss()
        loss.backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


MOVED = " | move_masks(grow='gradient', fraction=0.5, every=2, until=6)"
OPTIMIZERS: dict[str, Any] = {"adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
                              "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize(("structure", "moved"), [("unstructured", ""), ("unstructured", MOVED), ("8x1", MOVED), ("fan_in", MOVED), ("1:4", "")])
def test_it_trains_as_with_masks(structure: str, moved: str, optimizer: str) -> None:
    """The same losses, masks and weights; parameters and the optimizer's memory are those of the kept places."""
    recipe = f"mask_weights(structure={structure!r}, density=0.25){moved}"
    masked, packed = attached(recipe), attached(f"{recipe} | pack()")
    trained = [OPTIMIZERS[optimizer](module.parameters()) for module, _ in (masked, packed)]
    losses = [train(*each, made, 8) for each, made in zip((masked, packed), trained, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, mask in masked[1].masks.items():
        assert torch.equal(mask, packed[1].masks[name])
        torch.testing.assert_close(masked[1].weights()[name], packed[1].weights()[name], rtol=1e-3, atol=1e-4)
    kept = sum(int(packed[1].masks[name].sum()) for name in ("first", "last"))
    assert sum(parameter.numel() for parameter in packed[0].parameters()) == kept + 24 + 8
    states = [value for state in trained[1].state.values() for value in state.values() if isinstance(value, Tensor) and value.dim()]
    assert sum(value.numel() for value in states) == (2 if optimizer == "adamw" else 1) * (kept + 24 + 8)


def test_a_run_goes_on_from_its_state() -> None:
    """Loaded into a module whose places, and number of them, are others; bit-equal from there on."""
    recipe = "mask_weights(score='random', density=0.25)" + MOVED + " | pack()"
    whole, hook = attached(recipe)
    optimizer = OPTIMIZERS["adamw"](whole.parameters())
    train(whole, hook, optimizer, 3)
    state = copy.deepcopy((whole.state_dict(), hook.state_dict(), optimizer.state_dict()))
    expected = train(whole, hook, optimizer, 4)
    module, hook = attached(recipe.replace("density=0.25", "density=0.5"))
    other = OPTIMIZERS["adamw"](module.parameters())
    train(module, hook, other, 1)
    module.load_state_dict(state[0])
    module, hook = copy.deepcopy((module, hook))
    other = OPTIMIZERS["adamw"](module.parameters())
    hook.load_state_dict(state[1])
    other.load_state_dict(state[2])
    for layer in (part for part in module.modules() if isinstance(part, Packed)):
        layer.stored.check()
    first = functional.mse_loss(module(X), Y)
    assert float(first.detach()) == expected[0]


def test_other_places_in_the_same_parameter() -> None:
    """A graph from before is still alive, and knows the parameter's old shape."""
    form, other = stored("csr", 12, 16, 0.5), stored("csr", 12, 16, 0.2)
    layer, x = layer_of(form), torch.randn(4, 16, dtype=torch.float32)
    held, parameter = layer(x).sum(), layer.values
    held.backward()
    layer.put(other)
    assert layer.values is parameter
    assert parameter.grad is None
    layer(x).sum().backward()
    torch.testing.assert_close(parameter.grad, other.gather(torch.ones(12, 4) @ x))
    assert held.grad_fn is not None


def test_places_that_are_loaded_over_others_are_seen() -> None:
    """As many of them, copied into the same buffers after kernels have run."""
    torch.manual_seed(0)
    form, other = stored("condensed", 12, 16, 0.25), stored("condensed", 12, 16, 0.25)
    layer, x = layer_of(form), torch.randn(4, 16, dtype=torch.float32)
    layer(x)
    layer.load_state_dict(layer_of(other).state_dict())
    torch.testing.assert_close(layer(x).detach(), x @ other.decode().T)


def test_frozen_weights_stay_and_compile_takes_what_was_trained() -> None:
    module, hook = attached("mask_weights(structure='8x1', density=0.5) | pack()", frozen=True)
    before = hook.weights()
    assert [name for name, parameter in module.named_parameters() if not parameter.requires_grad] == ["last.weight_packed.values"]
    train(module, hook, OPTIMIZERS["adamw"](module.parameters()), 3)
    assert torch.equal(before["last"], hook.weights()["last"])
    assert not torch.equal(before["first"], hook.weights()["first"])
    captured = sc.capture(module, (X,))
    assert sum(bool(PACKED.fullmatch(str(node.target))) for _, node in captured.nodes()) == 3
    compiled = sc.compile(module, (X,), recipe="pack() | lower(rounds=3)")
    torch.testing.assert_close(compiled(X), module(X).detach(), rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    mask = "mask_weights(density=0.25)"
    with pytest.raises(InputError, match="leave out pack"):
        attached(f"{mask} | move_masks(straight_through=True) | pack()")
    with pytest.raises(InputError, match="cannot start with more"):
        attached(f"{mask} | move_masks(sparsity='cubic(end=6)') | pack()")
    module, hook = attached(f"{mask} | move_masks(grow='random', every=1, until=4) | pack()")
    functional.mse_loss(module(X), Y).backward()
    with pytest.raises(InputError, match=r"call hook.step\(optimizer\)"):
        hook.step()
    other, _ = attached(mask)
    with pytest.raises(InputError, match="does not train"):
        hook.step(torch.optim.SGD(other.parameters(), 0.1))
