"""Our compiled models beside every engine that can be had, interleaved in one run.

    scripts/peers_env.sh                                            # once: environments for the engines that need their own
    python benchmarks/peers.py [--cases '4096x4096/128/*/0.1' 'bert/*'] [--engines ours torch_dense openvino ...] [--rounds 15] [--json FILE]
    python benchmarks/peers.py --list                               # every case: shape or model / rows / structure / density

Each engine lives in a process of its own and all take turns, round after round; an engine whose turn it is not is stopped (SIGSTOP), so that no
spinning thread of it takes a processor. Chains of Linear + ReLU are given in milliseconds a layer, stacks and networks in milliseconds a call. A
ratio is the median over rounds of that form's time / the other's, with quartiles; `error` is the largest difference from torch's float32 result,
relative to its largest number. Engines that are blind to zeros run once for all cases of one shape and number of rows.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from peer_cases import DTYPES, Case, export, names
from peer_process import Engine, EngineError
from peer_report import show, summary
from rich.console import Console

from sparsify_compiler.target import host

# Engine -> (environment under --environments, or None for our own; whether it makes use of zeros)
ENGINES = {
    "torch_dense": (None, False), "openvino": ("engines", False), "onnxruntime": ("engines", False), "litert": ("engines", False),
    "torch_csr": (None, True), "mkl": ("engines", True), "deepsparse": ("deepsparse", True), "ours": (None, True), "ours_kernels": (None, True),
    "ours_parts": (None, True),
}
DEFAULT = [name for name in ENGINES if name not in ("ours_kernels", "ours_parts")]
WRONG = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3}  # an error above this is no rounding: the form is left out
FEWEST = 3  # rounds that are run whatever they take


@dataclass
class Form:
    """One way to run a case. `case` is None where the form is the dense one of the whole group. ms holds a layer's time in each round."""

    engine: str
    name: str
    dtype: str
    case: str | None
    key: str
    layers: int
    error: float = 0.0
    calls: int = 1
    ms: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["768x3072/1*/unstructured/0.1"], help="names with wildcards")
    parser.add_argument("--engines", "--peers", nargs="+", default=DEFAULT, choices=list(ENGINES))
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="of ours and torch's forms")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=float, default=60.0, help="milliseconds that a form runs in each round, at least one call")
    parser.add_argument("--seconds", type=float, default=90.0, help="stop a group's rounds after this long (three rounds at the least)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--environments", type=Path, default=Path("build/peers"), help="where scripts/peers_env.sh made them")
    parser.add_argument("--folder", type=Path, help="keep the cases' files here, and use those that are there: drawing large weights takes long")
    parser.add_argument("--export", action="store_true", help="write the cases' files into --folder, and measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    options = parser.parse_args()
    if options.list:
        print("\n".join(names()))
        return
    cases = [Case.parse(name) for name in names() if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.cases)]
    if not cases:
        parser.error("no case has such a name; --list shows them all")

    if options.export:
        if options.folder is None:
            parser.error("--export needs --folder")
        for case in cases:
            with exported(case, options.folder):
                pass
        return

    os.environ[DTYPES] = " ".join(options.dtypes)    # engines are processes
    console, results = Console(width=150), {}
    engines = start(options, console)
    try:
        for _, group in groupby(sorted(cases, key=lambda case: case.group), key=lambda case: case.group):
            picked = list(group)
            for case, forms in zip(picked, measure(picked, engines, options, console), strict=True):
                results[case.name] = forms
                show(case.name, forms, console)
    finally:
        for engine in engines.values():
            engine.close()
    summary(results, f"{options.threads} threads, {host().mcpu}, load {os.getloadavg()[0]:.1f}", console)
    if options.json:
        options.json.write_text(json.dumps({case: [asdict(form) for form in forms] for case, forms in results.items()}, indent=1))


def start(options: argparse.Namespace, console: Console) -> dict[str, Engine]:
    """A process for each engine whose environment is there."""
    started = {}
    for name in options.engines:
        environment = ENGINES[name][0]
        python = Path(sys.executable) if environment is None else options.environments / environment / "bin" / "python"
        if python.exists():
            started[name] = Engine(name, python, options.threads, options.verbose)
        else:
            console.print(f"{name} is left out: there is no {python}; scripts/peers_env.sh makes it")
    return started


def measure(cases: list[Case], engines: dict[str, Engine], options: argparse.Namespace, console: Console) -> list[list[Form]]:
    """The forms of each case of one group, timed together; dense forms are in the list of every case."""
    forms: list[Form] = []
    for i, case in enumerate(cases):
        with exported(case, options.folder) as folder:
            for engine in engines.values():
                if i == 0 or ENGINES[engine.name][1]:
                    forms += load(engine, case, folder, console)
    forms = [form for form in forms if ready(form, engines[form.engine], options.turn, console)]
    take_turns(forms, engines, options.rounds, options.seconds)
    for engine in engines.values():
        engine.ask("forget", [])
    return [[form for form in forms if form.case in (None, case.name)] for case in cases]


@contextmanager
def exported(case: Case, folder: Path | None) -> Iterator[Path]:
    """Where the case's files are: kept in `folder` for the next run, or in a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if folder is None else folder / case.name.replace("/", "_")
        if not (place / "case.json").exists():  # the last file that is written
            place.mkdir(parents=True, exist_ok=True)
            export(case, place)
        yield place


def load(engine: Engine, case: Case, folder: Path, console: Console) -> list[Form]:
    """The engine's forms of a case; says why there are none."""
    try:
        answer = engine.ask("load", str(folder), patience=600)
    except EngineError as error:
        console.print(f"{engine.name} is left out for {case.name}: {error}", markup=False)
        return []
    for name, why in answer["skipped"].items():
        console.print(f"{name} is left out for {case.name}: {why}", markup=False)
    layers = json.loads((folder / "case.json").read_text())["layers"]
    only = case.name if ENGINES[engine.name][1] else None
    return [Form(engine.name, name, dtype, only, f"{case.name} {name}", layers) for name, dtype in answer["forms"].items()]


def ready(form: Form, engine: Engine, turn: float, console: Console) -> bool:
    """Check what the form computes and find out how many calls make a turn."""
    try:
        form.error = engine.ask("check", form.key)["error"]
        if not form.error <= WRONG[form.dtype]:
            raise EngineError(f"it computes something else: its error is {form.error:.2g}")
        form.calls = max(1, min(1000, round(turn / max(engine.ask("run", form.key, calls=2)["ms"] / 2, 1e-3))))
    except EngineError as error:
        console.print(f"{form.name} is left out: {error}", markup=False)
        return False
    return True


def take_turns(forms: list[Form], engines: dict[str, Engine], rounds: int, seconds: float) -> None:
    """Round after round, each form once."""
    import time

    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= FEWEST and time.monotonic() > end:
            break
        for form in forms:
            form.ms.append(engines[form.engine].ask("run", form.key, calls=form.calls)["ms"] / form.calls / form.layers)


if __name__ == "__main__":
    main()
