"""What TVM's operators leave as plain loops: fused, spread over threads, in vectors; and how a module is lowered when kernels of ours are in it.

TVM takes tensors to start at multiples of 64 bytes and loads whole lines so, which ends the process where one does not: those of a mapped file
start wherever its header ends. Here they are promised to start at a multiple of an element.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.sym import Analyzer
from tvm.tirx.buffer import BufferType
from tvm_ffi import structural_map

from sparsify_compiler.codegen.kernels.row_loops import ALONE
from sparsify_compiler.codegen.whole_graph_numbers import numbers_as_torch
from sparsify_compiler.target import Target

PIPELINE = "sparsify_whole_graph"
VIEWS = ["relax.reshape"]    # stays an operator of the virtual machine, which copies nothing


def relax_pipeline(target: Target, reference: list[str]) -> Any:
    """Passes from the imported graph to calls of functions, each scheduled; names of reductions without a kernel are added to `reference`."""
    _register()

    def run(module: Any, _: Any) -> Any:
        passes = relax.transform
        fused = tvm.transform.Sequential([
            passes.BundleModelParams(), relax.backend.DispatchSampling(), relax.backend.DispatchSortScan(), passes.LegalizeOps(skip_ops=VIEWS),
            passes.AnnotateTIROpPattern(), passes.FoldConstant(), passes.FuseOps(), passes.FuseTIR(), passes.DeadCodeElimination()])(module)
        scheduled = _scheduled(fused, target, reference)
        return tvm.transform.Sequential([
            passes.ToNonDataflow(), passes.RemovePurityChecking(), passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(), passes.LowerAllocTensor(), passes.KillAfterLastUse(), passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(), passes.VMShapeLower(), passes.AttachGlobalSymbol()])(scheduled)

    return tvm.transform.module_pass(run, opt_level=0)


def _scheduled(module: Any, target: Target, reference: list[str]) -> Any:
    """The same module, every function of it that is TVM's own scheduled, for tensors that start anywhere."""
    changed = {}
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and "sparsify" not in (function.attrs or {}):
            found = _schedule(function, target)
            if found is None:
                reference.append(name.name_hint)
            changed[name] = _anywhere(numbers_as_torch(function if found is None else found))
    module.update(tvm.IRModule(changed, attrs=module.attrs))
    return module


def _anywhere(function: Any) -> Any:
    """The same function of tensors that start at a multiple of an element."""
    def aligned(one: Any) -> Any:
        return BufferType(one.dtype, one.storage_scope, one.shape, one.strides, one.elem_offset, max(1, one.dtype.dtype.itemsize), one.offset_factor,
                          one.layout, one.allocated_addr)

    return structural_map(function, callbacks=(BufferType, aligned))


def _schedule(function: Any, target: Target) -> Any:
    """One loop nest over the result, its innermost loop in vectors, the others on threads where that pays; None for what is a reduction."""
    alone = _nest(function, target, False)
    if alone is None or target.cores == 1:
        return alone and alone[0]
    few = alone[1] < ALONE
    if isinstance(few, tirx.IntImm | bool):
        return alone[0] if few else _nest(function, target, True)[0]
    return _either(few, alone[0], _nest(function, target, True)[0])


def _nest(function: Any, target: Target, parallel: bool) -> Any:
    """The function with its loops scheduled, and the number of elements of its result."""
    schedule = s_tir.Schedule(function)
    blocks = normalize_prim_func(schedule)
    if not blocks or any(not block.is_injective() for block in blocks):
        return None
    for block in blocks[:-1]:
        try:
            schedule.compute_inline(block.block_rv)
        except s_tir.ScheduleError:
            return None
    loops = schedule.get_loops(blocks[-1].block_rv)
    size = math.prod((schedule.get(loop).extent for loop in loops), start=tirx.const(1, "int64"))
    if loops:
        _spread(schedule, loops, target, parallel)
    return schedule.mod["main"].with_attrs(dict(function.attrs)), Analyzer().simplify(size)


def _either(condition: Any, first: Any, second: Any) -> Any:
    """The same function scheduled in two ways, as one that chooses."""
    root, other = first.body, second.body
    body = tirx.IfThenElse(condition, root.block.body, other.block.body)
    block = s_tir.SBlock(root.block.iter_vars, root.block.reads, root.block.writes, root.block.name_hint, body, root.block.init,
                         root.block.alloc_buffers, root.block.match_buffers, root.block.annotations)
    return second.with_body(s_tir.SBlockRealize(root.iter_values, root.predicate, block))


def _spread(schedule: Any, loops: list[Any], target: Target, parallel: bool) -> None:
    *outer, inner = loops
    extent = schedule.get(inner).extent
    lanes = target.vector_bytes // 4
    if isinstance(extent, tirx.IntImm) and int(extent) % lanes == 0:
        rest, vector = schedule.split(inner, [None, lanes])
        schedule.vectorize(vector)
        outer = [*outer, rest]
    elif not outer:
        outer = [inner]
    if outer and parallel:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])


@cache
def _register() -> None:
    """The pipeline of a module that holds kernels of ours and functions with blocks: each kind takes its own way."""
    from tvm.tirx.compilation_pipeline import finalize_device_passes, finalize_host_passes, register_tir_pipeline, tirx_pipeline

    ours, _, _ = tirx_pipeline()
    theirs, _, _ = tvm.s_tir.pipeline.default_s_tir_pipeline()

    def run(module: Any, _: Any) -> Any:
        kinds: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
        for name, function in module.functions.items():
            kinds["sparsify" not in function.attrs][name] = function
        merged: dict[Any, Any] = {}
        for functions, passes in zip(kinds, (ours, theirs), strict=True):
            if functions:
                merged.update(passes(tvm.IRModule(functions, attrs=module.attrs)).functions.items())
        return tvm.IRModule(merged, attrs=module.attrs)

    register_tir_pipeline(PIPELINE, lambda: (tvm.transform.module_pass(run, opt_level=0), finalize_host_passes, finalize_device_passes))
