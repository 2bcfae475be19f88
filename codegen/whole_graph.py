"""A whole graph as one library without torch: fx graphs in normal form -> Relax -> machine code for any CPU target.

TVM's own importer translates what is cheap wherever it runs (views, comparisons, gathers); layers, norms, attention and activations become calls
of kernels of ours (whole_graph_convert.py), and what the importer's operators leave as plain loops is scheduled by whole_graph_schedule.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from sparsify_compiler.codegen.laid import Laid
from sparsify_compiler.codegen.targets import tvm_target
from sparsify_compiler.codegen.whole_graph_planes import LaidPlanes
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

ARCHITECTURES = ("x86_64", "aarch64")
HERE = ("cc", "gcc", "clang")   # compilers for the machine that they run on
OPTIONS = ("-s", "-Wl,-z,max-page-size=16384", "-Wl,-z,noexecstack")


@dataclass(frozen=True)
class Product:
    """A layer with what follows it: laid out for the target (a convolution: for images of one size), its input, and what is added to it, if anything.

    name   of its parameters, before their own; layers that share a laid out weight share it
    given  what its kernels are given beside x, computed by the graph
    """

    name: str
    laid: Laid | LaidPlanes
    x: fx.Node
    other: fx.Node | None = None
    given: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Input:
    """A tensor that a function is called with; each dimension a number or the name of a symbol. `updated`: the function writes into it."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    updated: bool = False


@dataclass(frozen=True)
class Function:
    """A graph in normal form, to become a function of the library. It is changed: give a private copy.

    tensors    name of a stored tensor, as get_attr nodes have it -> the tensor
    products   node -> the layer that gives its value
    computed   nodes whose values products compute on their way
    reference  ops that had no kernel, and were written as others
    one_token  is it a step of decoding?
    """

    name: str
    graph: fx.Graph
    tensors: Callable[[str], Tensor]
    inputs: Sequence[Input]
    outputs: Sequence[str]
    products: Mapping[fx.Node, Product] = field(default_factory=dict)
    computed: frozenset[fx.Node] = frozenset()
    reference: tuple[str, ...] = ()
    one_token: bool = False


@dataclass(frozen=True)
class Library:
    """What was compiled: write() makes the file.

    functions   for the manifest, by name: inputs, outputs and names of parameters, in the order of the arguments
    parameters  every tensor that a function reads, by name
    reference   operators that run without a kernel of ours and are more than a copy
    """

    executable: Any
    target: Target
    functions: dict[str, Any]
    parameters: dict[str, Tensor]
    reference: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Link model.so. Raises KernelError where there is no C compiler for the target."""
        from tvm.support import cc

        self.executable.export_library(str(path), fcompile=cc.cross_compiler(compiler_for(self.target), options=list(OPTIONS)))


def compile_graphs(functions: Sequence[Function], ranges: Mapping[str, tuple[int, int | None]], target: Target) -> Library:
    """Compile graphs for a target into one library. Raises KernelError: an operator that cannot be translated."""
    import tvm
    from tvm import relax

    from sparsify_compiler.codegen.whole_graph_import import GraphImporter, Parts
    from sparsify_compiler.codegen.whole_graph_schedule import PIPELINE, relax_pipeline

    if target.arch not in ARCHITECTURES:
        raise KernelError(f"whole graphs are for processors, not for {target.arch}", where=target.name, hint="save the model with save() instead")
    parts = Parts(relax.BlockBuilder(), target, dict(ranges), reference=[name for one in functions for name in one.reference])
    described = {one.name: GraphImporter(one, parts).translate() for one in functions}
    reference: list[str] = sorted(set(parts.reference))
    try:
        with tvm.transform.PassContext(opt_level=3):
            passes = relax_pipeline(target, reference)
            executable = tvm.compile(parts.builder.get(), target=tvm_target(target), relax_pipeline=passes, tir_pipeline=PIPELINE)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        last = str(error).strip().splitlines()[-1]
        raise KernelError(f"TVM could not compile it: {last}", where="whole graph", hint="report this as a bug") from error
    return Library(executable, target, described, parts.parameters, tuple(sorted(set(reference))))


def compiler_for(target: Target) -> str:
    """A C compiler that links for the target: $SPARSIFY_CC, or the usual one. Raises KernelError where there is none."""
    import os
    import platform
    import shutil

    usual = (f"{target.arch}-linux-gnu-gcc", *(HERE if platform.machine() == target.arch else ()))
    names = (os.environ["SPARSIFY_CC"],) if os.environ.get("SPARSIFY_CC") else usual
    for name in names:
        found: str | None = shutil.which(name)
        if found is not None:
            return found
    raise KernelError(f"no C compiler for {target.arch} is installed (looked for {', '.join(names)}), which links the library", where=target.name,
                      hint="install one (Debian: gcc, gcc-aarch64-linux-gnu), or name it in SPARSIFY_CC")
