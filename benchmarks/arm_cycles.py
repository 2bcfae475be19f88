"""Modelled cycles of the inner loops of kernels on 64-bit Arm processors: llvm-mca on the machine code, no processor and no measurement.

    python benchmarks/arm_cycles.py                 # needs llvm-mca (Debian: llvm-19)

Of each kernel the hottest loop is looked at: the innermost one with the most multiply-adds. Peak is one multiply-add a cycle and pipe, of which a
Cortex-A76 has two and a Neoverse-V2 four. The model knows ports and latencies; it sees no cache, no branch that is guessed wrong and no memory.
LLVM models the Cortex-A76 as a Cortex-A57, so its figures are those of the Neoverse-N1, which is the same core. Spills are stores to and loads from
the stack in that loop. The busiest ports are those of the kind that has the fewest cycles to spare: a loop that keeps them busy is at its limit.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify_compiler.codegen import planes
from sparsify_compiler.codegen.kernels import lanes
from sparsify_compiler.codegen.kernels.attend_dense import AttendDense
from sparsify_compiler.codegen.kernels.attend_few import AttendFew
from sparsify_compiler.codegen.kernels.attend_panel import AttendPanel
from sparsify_compiler.codegen.kernels.attend_step import AttendStep
from sparsify_compiler.codegen.kernels.dense_panel import DensePanel
from sparsify_compiler.codegen.kernels.depthwise import Depthwise
from sparsify_compiler.codegen.kernels.expert_panels import ExpertPanels
from sparsify_compiler.codegen.kernels.expert_rows import ExpertRows
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsLayout
from sparsify_compiler.codegen.kernels.ffn_rows import FfnRows
from sparsify_compiler.codegen.kernels.finish import NOTHING
from sparsify_compiler.codegen.kernels.gather_rows import GatherRows
from sparsify_compiler.codegen.kernels.gemv import Gemv
from sparsify_compiler.codegen.kernels.layout import Layout
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.codegen.kernels.panel import Panel
from sparsify_compiler.codegen.kernels.planes import Planes
from sparsify_compiler.codegen.kernels.rows import Rows
from sparsify_compiler.codegen.kernels.slice_layout import SliceLayout
from sparsify_compiler.codegen.kernels.stream_rows import StreamRows
from sparsify_compiler.codegen.kernels.strip_layout import StripLayout
from sparsify_compiler.codegen.kernels.strip_panel import StripPanel
from sparsify_compiler.codegen.kernels.top_pages import TopPages
from sparsify_compiler.codegen.targets import tvm_target
from sparsify_compiler.codegen.vectors import Vectors, vectors_of
from sparsify_compiler.target import resolve

MODELS = {"cortex-a76": ("neoverse-n1", 2), "neoverse-v2": ("neoverse-v2", 4)}   # LLVM's model, and its pipes that multiply
ITERATIONS = 200
MULTIPLY = re.compile(r"^(fml[as]|bfdot|bfmmla|[su]dot|smmla)$")
PORTS = {"V": "vectors", "L": "loads", "B": "branches"}     # LLVM's letters of ports: vectors are multiplied, moved and stored; loads and stores
JUMP = re.compile(r"^(b\.\w+|cbn?z|tbn?z)$")


@dataclass(frozen=True)
class Loop:
    """Instructions of an innermost loop."""

    lines: tuple[str, ...]

    @property
    def multiply_adds(self) -> int:
        return sum(bool(MULTIPLY.match(line.split()[0])) for line in self.lines)

    @property
    def spills(self) -> int:
        return sum(line.split()[0].startswith(("ld", "st")) and "[sp" in line for line in self.lines)


def cases(cut_for: Vectors, pairs: bool) -> Iterator[tuple[str, str, Any]]:
    """Name, what bounds it, and schedule; pairs: the machine multiplies two of bfloat16 an instruction."""
    for r in (16, 8, 4, 2, 1):
        layout = Layout(r, "float32", "int16")
        vectors, most = lanes.tile_of(layout, cut_for)
        yield f"lanes, panel r={r}", "compute" if r >= 4 else "loads", Panel(layout, vectors, True, False, cut_for, most)
    for r, vectors, most in ((16, 2, 8), (4, 4, 4)):
        yield f"lanes, panel r={r} bfloat16", "compute", Panel(Layout(r, "bfloat16", "int16"), vectors, True, pairs, cut_for, most)
    for r in (4, 2, 1):
        yield f"strips r={r}", "compute" if r >= 4 else "loads", StripPanel(StripLayout(r, "float32", "float32"), 2, NOTHING, cut_for)
    for dtype in ("float32", "bfloat16"):   # of libraries, and of FFNs and inputs that many rows select
        yield f"dense, panel{' bfloat16' * (dtype != 'float32')}", "compute", DensePanel("outputs", 2, NOTHING, dtype, dtype, dtype, cut_for)
    yield "attend, panel", "compute", AttendPanel(4, cut_for)
    yield "attend, library", "compute", AttendDense(64, 64, 8, 2, 0.125, True, Mask(), ("bhsd",) * 4, False, cut_for.lanes, 4, cut_for.count // 8, 2)
    yield "experts, panels", "compute", ExpertPanels(ExpertsLayout("float32", "silu", True), 2, cut_for)
    yield "experts, panels bfloat16", "compute", ExpertPanels(ExpertsLayout("bfloat16", "silu", True), 2, cut_for, "dots" if pairs else "fma")
    for r in (8, 4, 2, 1):
        yield f"planes r={r}", "compute" if r >= 2 else "loads", Planes(r, planes.TILES_OF[cut_for.lanes][r], False, NOTHING, True, None, cut_for)
    for size, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1)):
        name = f"depthwise {size}x{size}" + (f", stride {stride}" if stride > 1 else "")
        yield name, "compute", Depthwise((size, size), (stride, stride), (1, 1), size // 2, NOTHING, True, cut_for)
    for r in (16, 4, 1):
        yield f"lanes, rows r={r}", "memory", Rows(Layout(r, "float32", "int16"), True)
    for n, m in ((0, 0), (2, 4)):   # not offered for Arm: rows r=1 computes the same weights
        yield f"slices, {'places' if n else 'gaps'}", "vectors", Gemv(SliceLayout("float32", "float32", False, n, m), True, cut_for)
    yield "streams", "memory", StreamRows("float32", True, cut_for)
    yield "streams bfloat16", "memory", StreamRows("bfloat16", True, cut_for)
    yield "gather", "memory", GatherRows("float32", 256, False, False, True, cut_for)
    yield "gather_ffn", "memory", FfnRows("float32", "silu", 256, False, True, cut_for)
    yield "experts, rows", "memory", ExpertRows(ExpertsLayout("float32", "silu", True), True, cut_for)
    yield "experts, rows bfloat16", "memory", ExpertRows(ExpertsLayout("bfloat16", "silu", True), True, cut_for, pairs)
    yield "attend, few", "memory", AttendFew("float32", 4, cut_for)
    yield "attend, library, a token", "memory", AttendStep(64, 64, 8, 2, 0.125, cut_for.lanes, cut_for.count // 2, 2)
    yield "top_pages", "memory", TopPages("float32", "mean", 1, cut_for)


def assembly(schedule: Any, target: str) -> list[str]:
    """The machine code as text, one instruction or label a line."""
    import tvm

    module = tvm.compile(tvm.IRModule({"main": schedule.compute()}), target=tvm_target(resolve(target)), tir_pipeline="tirx").mod
    return [line.split("//")[0].strip() for line in module.inspect_source("asm").splitlines()]


def loops(lines: list[str], innermost: bool = True) -> Iterator[Loop]:
    """Every loop: from a label to a jump back to it; only those without another within. Jumps ahead count as not taken."""
    labels = {label[1]: number for number, line in enumerate(lines) if (label := re.match(r"(\.LBB\w+):", line))}
    closed = -1
    for number, line in enumerate(lines):
        target = re.search(r"(\.LBB\w+)$", line)
        if not target or not JUMP.match(line.split()[0]):
            continue
        start = labels[target[1]]
        if start < number and (start > closed or not innermost):
            yield Loop(tuple(one for one in lines[start : number + 1] if one and not one.startswith(".")))
        closed = max(closed, start) if start < number else closed


def hottest(lines: list[str]) -> Loop:
    """Of the innermost loops with a large share of multiply-adds the one with most; where none has any, the smallest loop around some."""
    if not any(loop.multiply_adds for loop in loops(lines)):
        return min((loop for loop in loops(lines, innermost=False) if loop.multiply_adds), key=lambda loop: len(loop.lines))
    return max(loops(lines), key=lambda loop: (loop.multiply_adds * (loop.multiply_adds >= len(loop.lines) / 8), loop.multiply_adds))


@dataclass(frozen=True)
class Modelled:
    """Cycles of one iteration in the long run, which kind of port is busiest, and its share of those cycles."""

    cycles: float
    port: str
    busy: float


def modelled(loop: Loop, model: str, tool: str) -> Modelled:
    """Raises SystemExit where the model does not know an instruction."""
    text = "loop:\n" + "\n".join(re.sub(r"\.LBB\w+$", "loop", line) for line in loop.lines) + "\n"

    def simulated(iterations: int) -> Any:
        command = [tool, "-mtriple=aarch64-linux-gnu", f"-mcpu={model}", f"-iterations={iterations}", "-json"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout)

    found, more = simulated(ITERATIONS), simulated(2 * ITERATIONS)
    (region,), (longer,), names = found["CodeRegions"], more["CodeRegions"], found["TargetInfo"]["Resources"]
    cycles = (longer["SummaryView"]["TotalCycles"] - region["SummaryView"]["TotalCycles"]) / ITERATIONS     # without filling and emptying the pipes
    # Behind those of each instruction are those of the whole loop.
    used = [one for one in region["ResourcePressureView"]["ResourcePressureInfo"] if one["InstructionIndex"] == len(loop.lines)]
    busiest = max(used, key=lambda one: float(one["ResourceUsage"]))
    letter = names[busiest["ResourceIndex"]].partition("Unit")[2][0]
    return Modelled(cycles, PORTS.get(letter, "integers"), busiest["ResourceUsage"] / cycles)


def rows_of(target: str, tool: str) -> Iterator[Mapping[str, Any]]:
    """What is found of each kernel."""
    model, pipes = MODELS[target]
    for name, bound, schedule in cases(vectors_of(resolve(target)), resolve(target).has("bf16")):
        loop = hottest(assembly(schedule, target))
        found = modelled(loop, model, tool)
        yield {"kernel": name, "bound": bound, "instructions": len(loop.lines), "multiply-adds": loop.multiply_adds, "cycles": found.cycles,
               "share": loop.multiply_adds / pipes / found.cycles, "port": f"{found.port} {found.busy:.0%}", "spills": loop.spills}


def main() -> None:
    tool = shutil.which("llvm-mca-19") or shutil.which("llvm-mca")
    if tool is None:
        raise SystemExit("llvm-mca is missing: apt-get install llvm-19")
    for target in sys.argv[1:] or MODELS:
        table = Table(title=f"{target}, modelled by LLVM's {MODELS[target][0]}")
        for column in ("kernel", "bound by", "instructions", "multiply-adds", "cycles", "of peak", "busiest ports", "spills"):
            table.add_column(column, justify="left" if column in ("kernel", "bound by", "busiest ports") else "right")
        for row in rows_of(target, tool):
            table.add_row(row["kernel"], row["bound"], str(row["instructions"]), str(row["multiply-adds"]), f"{row['cycles']:.1f}",
                          f"{row['share']:.0%}", row["port"], str(row["spills"]))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
