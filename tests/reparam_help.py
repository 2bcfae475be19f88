"""For tests of exact reparameterisation: models with random statistics, and a pass run with its numbers checked in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.capture import capture
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves
from sparsify_compiler.program import Program, Stage, get_tensor, set_tensor
from sparsify_compiler.verify import verify

NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Sum(nn.Module):
    """Branches of one x, added by `join`: by default one after the other."""

    def __init__(self, *branches: nn.Module, join: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.branches, self.join = nn.ModuleList(branches), join or (lambda first, *others: sum(others, first))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*(branch(x) for branch in self.branches))


def randomised(*modules: nn.Module) -> nn.Module:
    """In float64 and eval mode, norms with statistics that hide no error."""
    model = (modules[0] if len(modules) == 1 else nn.Sequential(*modules)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2)
    return model


def ops(program: Program) -> list[str]:
    return [str(n.target).split(".")[1] for _, n in program.nodes() if n.op == "call_function"]


def rewritten(model: nn.Module, x: Tensor, item: Pass | Pipeline, dynamic: Any = None) -> Program:
    """The Program afterwards, its numbers checked to 1e-10."""
    program = capture(model, (x,), dynamic)
    after = (item if isinstance(item, Pipeline) else Pipeline((item,))).run(program, Context())
    check_preserves(program, after, (x,), Pass.preserves)
    return after


def left(model: nn.Module, x: Tensor, item: Pass | Pipeline, dynamic: Any = None) -> list[str]:
    """The ops that are left."""
    return ops(rewritten(model, x, item, dynamic))


def masked(program: Program, *weights: str) -> Program:
    """With a mask of half of each of these weights, as mask_weights leaves it."""
    region = program.regions[""]
    for name in weights:
        weight = next(n for n in region.graph.nodes if n.op == "get_attr" and n.target == name)
        keep = get_tensor(region.module, name).detach()
        keep = keep > keep.median()
        set_tensor(region.module, f"{name}_mask", keep)
        with region.graph.inserting_after(weight):
            mask = region.graph.get_attr(f"{name}_mask")
        with region.graph.inserting_after(mask):
            product = region.graph.call_function(torch.ops.aten.mul.Tensor, (), {"self": weight, "other": mask})
        mask.meta, product.meta = {"val": fake_like(keep, mode_of(region))}, {"val": weight.meta["val"]}
        weight.replace_all_uses_with(product, delete_user_cb=lambda user, product=product: user is not product)
    program.stage = Stage.SPARSE
    region.module.recompile()
    verify(program)
    return program
