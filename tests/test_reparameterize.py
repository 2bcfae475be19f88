"""reparameterize(): a plain module of its own that any batch, torch.compile and an optimiser take."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sparsify_compiler as sc
from sparsify_compiler.errors import SparsifyError


@pytest.fixture
def trained() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    for tensor in (model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias):
        tensor.data.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 8, 8)


def test_any_batch_and_no_norm(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    result = sc.reparameterize(model, (x,))
    assert not any("running" in name for name in result.state_dict())
    for batch in (x, x[:1], torch.cat([x, x, x])):
        torch.testing.assert_close(result(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_it_shares_no_tensor_with_the_model_and_trains(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    before = copy.deepcopy(model.state_dict())
    result = sc.reparameterize(model, (x,))
    held = {t.data_ptr() for t in model.state_dict().values()}
    assert not held & {t.data_ptr() for t in result.state_dict().values()}
    step, losses = torch.optim.SGD(result.parameters(), 0.05), []
    for _ in range(3):
        loss = result(x).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_torch_compile_takes_it_once(trained: tuple[nn.Module, Tensor]) -> None:
    """State that changes at the first call would be compiled again at the second, outside of what the user had set up (freezing)."""
    torch._dynamo.reset()
    model, x = trained
    counter = CompileCounter()
    compiled = torch.compile(sc.reparameterize(model, (x,)), backend=counter, dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_a_copy_is_its_own(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    result = sc.reparameterize(model, (x,))
    other = copy.deepcopy(result)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert bool((other(x) == 0).all())
    assert bool((result(x) != 0).any())


def test_what_changes_values_is_refused(trained: tuple[nn.Module, Tensor]) -> None:
    with pytest.raises(SparsifyError, match=r"mask_weights changes values(.|\n)*use compile\(\)"):
        sc.reparameterize(trained[0], (trained[1],), recipe="mask_weights(density=0.5)")


class Rounded(nn.Module):
    """A merged pair, whose result is rounded with the gradient of what it rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y + (y.round() - y).detach()


def test_what_the_model_detaches_stays_detached() -> None:
    torch.manual_seed(0)
    model, x = Rounded().eval(), torch.randn(2, 3, 5, 5)
    merged = sc.reparameterize(model, (x,))
    assert not [name for name, _ in merged.named_parameters() if "norm" in name]
    model(x).sum().backward()
    merged(x).sum().backward()
    biases = [parameter.grad for name, parameter in merged.named_parameters() if parameter.dim() == 1]
    scale = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)     # of the norm that the bias has in it now
    torch.testing.assert_close([bias * scale for bias in biases], [model.conv.bias.grad])
