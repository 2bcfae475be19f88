"""Exact reparameterisation of published networks: the same values, the structure that the papers promise, the kernels that one gets by hand."""

from __future__ import annotations

import copy
import functools
import operator
from collections import Counter
from typing import Any

import pytest
import torch
from models.convnext_vit import convnext_t, repa_vit_small
from models.fastvit import fastvit_t8
from models.fusing import parameters_in_millions, plain
from models.mobileone import mobileone_s0
from models.pretrained import NotInstalledError
from models.reparam_zoo import EVERY, NETWORKS, Network
from models.replknet import replknet_31b
from models.repvgg import repvgg_a0
from torch import Tensor, nn

import sparsify_compiler as sc

WHOLE = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "replknet_small", "efficientnet_lite0", "english_g2")
BLOCKS = ("acnet_tiny", "dbb_tiny", "convnext_tiny", "repa_vit_tiny", "repa_vit_split", "repa_vit_layer_norm")

Conv = tuple[Tensor, Any]  # weight, groups


@functools.cache
def lived_in(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network and its images; not to be edited."""
    network: Network = EVERY[name]
    try:
        return network.lived_in(image=network.small, dtype=dtype)
    except NotInstalledError as absent:
        pytest.skip(str(absent))


@functools.cache
def merged(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In float64 for batches of any size, which is the default; in float32 for the images' own."""
    model, images = lived_in(name, dtype)
    result: nn.Module = sc.reparameterize(model, (images,), dynamic=None if dtype == torch.float64 else {})
    return result


@functools.cache
def by_hand(name: str) -> nn.Module:
    return EVERY[name].by_hand(lived_in(name)[0])


@functools.cache
def graph(name: str) -> tuple[Counter[str], list[Conv]]:
    """Of the merged network, captured anew: how often each op occurs, and its convs."""
    program = sc.capture(merged(name), (lived_in(name)[1],))
    ops: Counter[str] = Counter()
    convs = []
    for region, node in program.nodes():
        if node.op == "call_function" and node.target is not operator.getitem:
            ops[str(node.target).split(".")[1]] += 1
        if node.target is torch.ops.aten.conv2d.default:
            convs.append((region.module.get_parameter(node.kwargs["weight"].target).detach(), node.kwargs.get("groups", 1)))
    return ops, convs


def convs_by_hand(name: str) -> list[Conv]:
    return [(module.weight.detach(), module.groups) for module in by_hand(name).modules() if isinstance(module, nn.Conv2d)]


def distance(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    with torch.no_grad():
        expected, got = model(images), other(images)
    assert got.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    return float((got - expected).abs().max() / expected.abs().max())


# ---- the networks themselves


@pytest.mark.parametrize(("make", "trained", "deployed"), [
    (repvgg_a0, 9.11, 8.31), (mobileone_s0, 5.29, 2.08), (fastvit_t8, 4.03, None), (replknet_31b, 79.9, None), (convnext_t, 28.59, None),
    (repa_vit_small, 22.09, 13.18),
])
def test_parameter_counts_are_the_published_ones(make: Any, trained: float, deployed: float | None) -> None:
    with torch.device("meta"):
        model = make()
    assert parameters_in_millions(model) == pytest.approx(trained, abs=0.05 if trained > 50 else 0.006)
    if deployed is not None:
        name = make.__name__
        model = lived_in(name)[0] if name in WHOLE else make().eval()
        assert parameters_in_millions(EVERY[name].by_hand(model)) == pytest.approx(deployed, abs=0.006)


@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_what_is_written_by_hand_is_exact(name: str) -> None:
    """And the images make a difference to the output: else a comparison of outputs would prove little."""
    model, images = lived_in(name)
    assert distance(model, by_hand(name), images) < 1e-12
    with torch.no_grad():
        first, second = model(images)
    assert float((first - second).abs().max()) > 0.02 * float(first.abs().max())


# ---- sc.reparameterize


@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_values_are_the_same_in_float64(name: str) -> None:
    model, images = lived_in(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert distance(model, merged(name), images) < 1e-10
    assert distance(model, merged(name), images[:1]) < 1e-10
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [*(name for name in WHOLE if name not in ("mobileone_s0", "replknet_small")), *BLOCKS])
def test_values_are_the_same_in_float32(name: str) -> None:
    """The other two, deep and random, lose more than this by themselves on images as small as the tests': test_full_size has them."""
    model, images = lived_in(name, torch.float32)
    assert distance(model, merged(name, torch.float32), images) < 1e-5


def test_repvgg_is_a_plain_chain() -> None:
    assert graph("repvgg_a0")[0] == {"conv2d": 22, "relu": 22, "adaptive_avg_pool2d": 1, "flatten": 1, "linear": 1}


def test_mobileone_is_a_plain_chain() -> None:
    assert graph("mobileone_s0")[0] == {"conv2d": 43, "relu": 43, "adaptive_avg_pool2d": 1, "flatten": 1, "linear": 1}


def test_repmixers_are_one_depthwise_conv_each() -> None:
    ops, kernels = graph("fastvit_t8")
    mixers = [weight for weight, groups in kernels if weight.shape[1:] == (1, 3, 3) and groups == len(weight) and len(weight) in (48, 96, 192, 384)]
    assert len(mixers) == 10 + 1  # and one in the stem
    assert (ops["batch_norm"], ops["sub"], ops["add"], ops["mul"]) == (0, 0, 10, 1)  # the skips of the ten FFNs; the gate before the classifier


@pytest.mark.parametrize(("name", "convs"), [("acnet_tiny", 4), ("dbb_tiny", 5)])
def test_blocks_become_one_conv_each(name: str, convs: int) -> None:
    assert graph(name)[0] == {"conv2d": convs, "relu": convs, "mean": 1, "linear": 1}


@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_as_many_layers_as_by_hand(name: str) -> None:
    ops, parts = graph(name)[0], list(by_hand(name).modules())
    for op, kind in (("conv2d", nn.Conv2d), ("linear", nn.Linear), ("batch_norm", nn.modules.batchnorm._BatchNorm)):
        assert ops[op] <= sum(isinstance(part, kind) for part in parts), op
    assert not any(ops[op] for op in ("where", "slice_scatter", "avg_pool2d", "sub"))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-11 * float(theirs.abs().max())


@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_kernels_are_those_of_the_hand(name: str) -> None:
    """Each conv by hand has a conv of ours with the same kernel, in any order. Where a norm between two 1x1 convs without an activation
    went into the second rather than the first, the two kernels differ and their product does not."""
    ours, theirs = list(graph(name)[1]), []
    for weight, groups in convs_by_hand(name):
        alike = [i for i, (kernel, g) in enumerate(ours) if g == groups and close(kernel, weight)]
        if alike:
            del ours[alike[0]]
        else:
            theirs.append((weight, groups))
    assert [(w.shape, g) for w, g in ours] == [(w.shape, g) for w, g in theirs]
    assert len(ours) == (4 if name == "efficientnet_lite0" else 0)
    for i in range(0, len(ours), 2):
        product, expected = (second[0].flatten(1) @ first[0].flatten(1) for first, second in (ours[i:i + 2], theirs[i:i + 2]))
        assert close(product, expected)


@pytest.mark.parametrize("name", ["repa_vit_tiny", "repa_vit_split"])
def test_the_idle_channels_of_an_ffn_are_one_square_linear(name: str) -> None:
    """Of 32 channels and 128 hidden ones, of which 32 are active."""
    program = sc.capture(merged(name), (lived_in(name)[1],))
    shapes = Counter(tuple(node.kwargs["weight"].meta["val"].shape) for _, node in program.nodes() if node.target is torch.ops.aten.linear.default)
    assert shapes == {(96, 32): 2, (32, 32): 2 + 6, (10, 32): 1}  # qkv; attention's out, and three an FFN; classifier


def test_the_pair_of_a_patch_embedding_stays_a_pair() -> None:
    """A depthwise 7x7 conv and the 1x1 behind it are one linear map, and would cost 49 times as much as one conv."""
    kernels = graph("fastvit_t8")[1]
    assert sum(weight.shape[1:] == (1, 7, 7) for weight, _ in kernels) == 3 + 10
    assert not any(weight.shape[1] > 3 and weight.shape[2] > 1 for weight, _ in kernels)


# ---- what users do with the result


def test_it_trains_on() -> None:
    model, images = lived_in("fastvit_tiny", torch.float32)
    result = copy.deepcopy(merged("fastvit_tiny", torch.float32))
    parameters = list(result.parameters())
    assert parameters
    assert all(p.requires_grad for p in parameters)
    target = torch.zeros(len(images), dtype=torch.long)
    losses = []
    step = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(2):
        loss = nn.functional.cross_entropy(result(images), target)
        step.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
        step.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    with torch.no_grad():
        assert losses[0] == pytest.approx(float(nn.functional.cross_entropy(model(images), target)), rel=1e-4)


def test_its_tensors_save_and_load(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    images = lived_in("repvgg_tiny", torch.float32)[1]
    result = merged("repvgg_tiny", torch.float32)
    safetensors.save_file(result.state_dict(), tmp_path / "model.safetensors")
    again = copy.deepcopy(result)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert distance(result, again, images) == 0
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in by_hand("repvgg_tiny").parameters())


def test_it_exports_to_onnx(tmp_path: Any) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    images = lived_in("repvgg_tiny", torch.float32)[1]
    result = merged("repvgg_tiny", torch.float32)
    torch.onnx.export(result, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    stored = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(stored)
    assert Counter(node.op_type for node in stored.graph.node)["Conv"] == 7
    assert not any(node.op_type in ("BatchNormalization", "Add") for node in stored.graph.node)
    got, = ReferenceEvaluator(stored).run(None, {stored.graph.input[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(got), result(images), rtol=1e-4, atol=1e-5)


# ---- as published, in full


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "repa_vit_large"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_full_size(name: str, dtype: torch.dtype, bound: float) -> None:
    try:
        model, images = NETWORKS[name].lived_in(batch=1, dtype=dtype)
    except NotInstalledError as absent:
        pytest.skip(str(absent))
    assert distance(model, sc.reparameterize(model, (images,)), images) < bound


def test_by_hand_agrees_with_torch() -> None:
    """torch's own fusion of a conv and its norm, where nothing else is to be merged."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model, _ = lived_in("replknet_tiny")
    conv, norm, *_ = model.stem[0]  # type: ignore[index, union-attr]
    expected = fuse_conv_bn_eval(conv, norm)
    ours = by_hand("replknet_tiny").stem[0][0]  # type: ignore[index, union-attr]
    for a, b in zip(plain(ours), plain(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
