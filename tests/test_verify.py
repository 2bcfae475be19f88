"""What is legal at each stage, and whether a pass kept what it promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsify_compiler import catalog
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import VerifyError
from sparsify_compiler.passes_api import Preserves
from sparsify_compiler.preserves import check_preserves, compare_outputs, difference, sample_inputs
from sparsify_compiler.program import Program, Region, Stage, TensorSpec, set_tensor
from sparsify_compiler.verify import TABLE, signature_of, verify

aten = torch.ops.aten


def program(dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval().to(dtype), (torch.randn(3, 4, dtype=dtype),))


def first(region: Region, target: object = aten.linear.default) -> torch.fx.Node:
    return next(n for n in region.graph.nodes if n.target is target)


def positional(region: Region) -> None:
    node = first(region, aten.relu.default)
    node.args, node.kwargs = (node.kwargs["self"],), {}


def unknown_argument(region: Region) -> None:
    first(region, aten.relu.default).kwargs = {**first(region, aten.relu.default).kwargs, "alpha": 2}


def missing_argument(region: Region) -> None:
    node = first(region)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "weight"}


def in_place(region: Region) -> None:
    first(region, aten.relu.default).target = aten.relu_.default


def python_function(region: Region) -> None:
    first(region, aten.relu.default).target = torch.relu


def method(region: Region) -> None:
    node = first(region, aten.relu.default)
    node.op, node.target = "call_method", "relu"


def missing_parameter(region: Region) -> None:
    next(n for n in region.graph.nodes if n.op == "get_attr").target = "0.wieght"


def other_shape(region: Region) -> None:
    set_tensor(region.module, "0.weight", nn.Parameter(torch.zeros(9, 4)))


def other_dtype(region: Region) -> None:
    set_tensor(region.module, "0.weight", nn.Parameter(torch.zeros(8, 4).double()))


def no_value(region: Region) -> None:
    del first(region).meta["val"]


def packed_too_early(region: Region) -> None:
    first(region, aten.relu.default).target = catalog.get("op", "linear_csr").op


def kernel_too_early(region: Region) -> None:
    first(region).meta["kernel"] = object()


def use_before_definition(region: Region) -> None:
    first(region).append(first(region))
    node = first(region, aten.relu.default)
    first(region).prepend(node)


@pytest.mark.parametrize(("spoil", "wrong"), [
    (positional, "node relu: aten.relu.default has arguments by position"), (unknown_argument, "no argument 'alpha'"),
    (missing_argument, "node linear: aten.linear.default lacks its argument 'weight'"), (in_place, "changes its arguments in place"),
    (python_function, "is not an operator of torch.ops"), (method, "call_method is not normal form"),
    (missing_parameter, "there is no parameter or buffer '0.wieght'"), (other_shape, r"is torch.float32 [9, 4], the graph says torch.float32 [8, 4]"),
    (other_dtype, "is torch.float64"), (no_value, "shape and dtype are unknown"),
    (packed_too_early, "is a packed op, which this stage does not allow (stage traced)"), (kernel_too_early, "is bound to a kernel"),
    (use_before_definition, "the graph is broken"),
])
def test_what_is_not_legal_is_named(spoil: Callable[[Region], None], wrong: str) -> None:
    good = program()
    verify(good)
    spoil(good.regions[""])
    with pytest.raises(VerifyError) as caught:
        verify(good)
    assert wrong in str(caught.value)


def test_the_table_knows_every_stage_and_only_grows() -> None:
    assert set(TABLE) == set(Stage)
    rows = [(TABLE[stage].packed, TABLE[stage].kernels) for stage in Stage]
    assert rows == sorted(rows)


def test_kernels_belong_to_packed_ops() -> None:
    lowered = program()
    lowered.stage = Stage.LOWERED
    first(lowered.regions[""]).meta["kernel"] = object()  # a linear may have its packed dense form
    verify(lowered)
    first(lowered.regions[""], aten.relu.default).meta["kernel"] = object()
    with pytest.raises(VerifyError, match="only packed ops"):
        verify(lowered)


def with_mask(mask: torch.Tensor, by: str = "mask_weights", name: str = "0.weight_mask") -> Program:
    masked = program()
    region = masked.regions[""]
    weight = first(region).kwargs["weight"]
    set_tensor(region.module, name, mask)
    with region.graph.inserting_before(first(region)):
        node = region.graph.get_attr(name)
        product = region.graph.call_function(aten.mul.Tensor, (), {"self": weight, "other": node})
    node.meta, product.meta = {"val": mask.to("meta"), "by": by}, dict(weight.meta)
    first(region).kwargs = {**first(region).kwargs, "weight": product}
    region.module.recompile()
    masked.stage = Stage.SPARSE
    return masked


def test_masks_are_bool_and_of_the_weights_shape() -> None:
    verify(with_mask(torch.ones(8, 4, dtype=torch.bool)))
    with pytest.raises(VerifyError, match=r"a mask is bool, this one is torch\.float32"):
        verify(with_mask(torch.ones(8, 4)))
    with pytest.raises(VerifyError, match=r"the mask is \[1, 4\], its weight \[8, 4\]"):
        verify(with_mask(torch.ones(1, 4, dtype=torch.bool)))
    verify(with_mask(torch.ones(8, 4), by="capture"))
    for stage in (Stage.TRACED, Stage.SPARSE):  # a model may bring its own: weight * buffer
        brought = with_mask(torch.ones(8, 4, dtype=torch.bool), by="capture")
        brought.stage = stage
        verify(brought)


def test_the_signature_is_shapes_and_dtypes_of_outputs() -> None:
    assert signature_of(program()) == {"": (((3, 2), torch.float32),)}
    with pytest.raises(VerifyError, match=r"output 0 was torch.float32 \[3, 2\], now torch.float64 \[3, 2\]"):
        verify(program(torch.float64), signature_of(program()))


# --- preserves -------------------------------------------------------------------------------------------------------------------------


def scaled(factor: float, dtype: torch.dtype) -> Program:
    changed = program(dtype).clone()
    region = changed.regions[""]
    set_tensor(region.module, "2.weight", nn.Parameter(region.module.get_parameter("2.weight") * factor))
    set_tensor(region.module, "2.bias", nn.Parameter(region.module.get_parameter("2.bias") * factor))
    return changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_hold_up_to_the_tolerance_of_the_dtype(dtype: torch.dtype) -> None:
    from sparsify_compiler.preserves import TOLERANCE

    example = (torch.randn(3, 4, dtype=dtype),)
    check_preserves(program(dtype), program(dtype), example, Preserves.VALUES)
    check_preserves(program(dtype), scaled(1.5, dtype), example, Preserves.SIGNATURE)
    for given in (example, None):
        with pytest.raises(VerifyError, match="output 0 differs by"):
            check_preserves(program(dtype), scaled(1 + 8 * TOLERANCE[dtype], dtype), given, Preserves.VALUES)


def test_difference() -> None:
    one = torch.tensor([1.0, -4.0])
    assert difference(one, one + torch.tensor([0.0, 0.4])) == pytest.approx(0.1)
    nan = torch.tensor([float("nan"), 1.0])
    assert difference(nan, nan.clone()) == 0
    assert difference(nan, torch.tensor([1.0, float("nan")])) == float("inf")
    assert difference(torch.tensor([float("inf")]), torch.tensor([-float("inf")])) == float("inf")
    assert difference(torch.tensor([float("nan")]), torch.tensor([float("inf")])) == float("inf")
    assert difference(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
    assert difference(torch.zeros(2), torch.full((2,), 1e-30)) == float("inf")
    assert difference(torch.tensor([1]), torch.tensor([2])) == float("inf")
    assert difference(one, one.double()) == float("inf")
    assert difference(None, None) == 0
    with pytest.raises(VerifyError, match="there were 1 outputs, now 2"):
        compare_outputs([one], [one, one])
    with pytest.raises(VerifyError, match="output 1 differs"):
        compare_outputs([one, one, one], [one, one + 1, one + 0.1])


def test_zeros_of_a_mask_must_stay() -> None:
    mask = torch.rand(8, 4) > 0.5
    before, fewer, more = with_mask(mask), with_mask(mask.logical_and(torch.rand(8, 4) > 0.5)), with_mask(torch.ones_like(mask))
    check_preserves(before, fewer, None, Preserves.MASK)
    with pytest.raises(VerifyError, match="0: zeros of the mask were lost"):
        check_preserves(before, more, None, Preserves.MASK)


def test_sample_inputs_follow_the_spec() -> None:
    region = program().regions[""]
    spec = TensorSpec(("batch", 5, "seq"), torch.int64)
    region.spec = type(region.spec)(("ids",), (spec, None, TensorSpec((2,), torch.bfloat16)), ("ids",), region.spec.in_spec, region.spec.out_spec,
                                    {"batch": (1, 1), "seq": (8, None)})
    ids, floats = sample_inputs(region)
    assert ids.shape == (1, 5, 8)
    assert set(ids.unique().tolist()) <= {0, 1}
    assert bool((ids[..., 0] == 1).all())
    assert floats.dtype == torch.bfloat16
    assert torch.equal(sample_inputs(region)[0], ids), "the same seed, the same inputs"
