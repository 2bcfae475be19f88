"""What training sees of reparameterisation: Tune mode's gradients are those of the unfused model; trained predictions do not change."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.fold import fold_all
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes.reparam.tune_convbn import TuneConvbn
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves
from sparsify_compiler.program import Program

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import reparam_quality
from fashion_mnist import FOLDER, AbsentError, images, trained

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def lived_in(*modules: nn.Module) -> nn.Module:
    """In float64 and eval mode, norms with statistics that hide no error."""
    model = nn.Sequential(*modules).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2)
    return model


def tuned(model: nn.Module, x: Tensor) -> Program:
    """The program in Tune mode, of a copy: the model's own parameters stay as they are. No norm is left, and the values are the same."""
    program = capture(copy.deepcopy(model), (x,))
    after = Pipeline((TuneConvbn(),)).run(program)
    check_preserves(program, after, (x,), TuneConvbn.preserves)
    assert not any("batch_norm" in str(node.target) for _, node in after.nodes())
    return after


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of x, for a loss without symmetry."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y.sin() * torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    assert all(g is not None for g in found.values())
    return found  # type: ignore[return-value]


def assert_close(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Equal names; each tensor to 1e-10 of its largest magnitude."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert float((value - found[name]).abs().max()) <= 1e-10 * float(value.abs().max()), name


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_gradients_are_those_of_the_unfused_block(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rank, groups, transposed = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    bias, affine, stride = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(1, 2))
    conv = (TRANSPOSED if transposed else CONVS)[rank](4, 8, 3, stride=stride, padding=1, groups=groups, bias=bias)
    model, x = lived_in(conv, NORMS[rank](8, affine=affine, eps=0.1)), torch.randn(2, 4, *[5] * rank).double()
    assert_close(gradients(model, x), gradients(instantiate(tuned(model, x)), x))


def network() -> nn.Module:
    return lived_in(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8),
                    nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6))


def test_training_takes_the_same_steps() -> None:
    """Adam for ten steps: weights, biases, scales and shifts stay those of the unfused model in eval mode."""
    torch.manual_seed(0)
    model, x, target = network(), torch.randn(4, 3, 8, 8).double(), torch.randn(4, 6).double()
    program = tuned(model, x)
    states = []
    for module in (model, instantiate(program)):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(10):
            optimiser.zero_grad()
            nn.functional.mse_loss(module(x), target).backward()
            optimiser.step()
        states.append({name: p.detach() for name, p in module.named_parameters()})
    assert_close(*states)
    for region in program.regions.values():  # Deploy mode: as trained, in one conv each
        fold_all(region)
    assert [str(n.target).split(".")[1] for _, n in program.nodes() if n.op == "call_function"] \
        == ["conv2d", "relu", "conv2d", "silu", "adaptive_avg_pool2d", "flatten", "linear"]
    torch.testing.assert_close(instantiate(program)(x), model(x), rtol=1e-10, atol=1e-10)


def test_folding_instead_would_train_another_model() -> None:
    """The paper's Deploy mode has the same values, but one parameter instead of w, g and beta."""
    torch.manual_seed(0)
    model, x = network(), torch.randn(4, 3, 8, 8).double()
    deployed = instantiate(Pipeline((FoldBatchnorm(),)).run(capture(copy.deepcopy(model), (x,))))
    assert len(list(deployed.parameters())) < len(list(model.parameters()))
    assert len(list(instantiate(tuned(model, x)).parameters())) == len(list(model.parameters()))


def test_masks_stay_zero_and_survive_folding() -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(4, 3, 8, 8).double()
    masked = Pipeline.parse("mask_weights(density=0.5, targets=('linear', 'conv'))").run(capture(model, (x,)))
    after = Pipeline((TuneConvbn(),)).run(masked)
    check_preserves(masked, after, (x,), TuneConvbn.preserves)
    for region in after.regions.values():
        fold_all(region)
    check_preserves(masked, after, (x,), TuneConvbn.preserves)
    weights = [node.kwargs["weight"] for _, node in after.nodes() if "weight" in node.kwargs]
    assert len(weights) == 3
    assert all(str(weight.target) == "aten.mul.Tensor" for weight in weights)


def test_less_is_kept_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(4, 3, 32, 32).double()
    before, after = (reparam_quality.kept_bytes(m, x) for m in (model, instantiate(tuned(model, x))))
    outputs = 4 * 8 * (32 * 32 + 30 * 30) * 8  # what the convs give, which only their norms read
    assert before - after == pytest.approx(outputs, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg", "repavit"])
def test_trained_predictions_do_not_change(name: str, tmp_path: Path) -> None:
    """A short training on real images; every test image gets the class that it got before the collapse. The full run is the benchmark."""
    data = dataset()
    model = trained(name, images("train", limit=6000), 2, tmp_path)
    found = reparam_quality.collapsed(model, (data.pixels[:2],))
    row = reparam_quality.compare(model, found, data)
    assert row.differing == 0
    assert row.after == row.before > 0.6
    assert reparam_quality.structure(found) == reparam_quality.EXPECTED[name]
    again = trained(name, images("train", limit=6000), 2, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def dataset() -> Any:
    try:
        return images("t10k", FOLDER)
    except AbsentError as absent:
        pytest.skip(str(absent))
