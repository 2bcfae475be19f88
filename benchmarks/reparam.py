"""Networks of several branches: as trained, merged by hand, and merged by us; all forms interleaved in one process.

    python benchmarks/reparam.py [--networks repvgg_a0,fastvit_t8] [--batches 1,8] [--json FILE] [--rounds 15] [--seconds 60] [--small]

Forms of each network: as trained, written by hand (by the formulas of its paper, in plain torch) and sc.reparameterize, each in eager mode, with
torch.compile and frozen weights, and (but for compile, which chooses layouts itself) in channels_last; and sc.compile(recipe="reparam"). A network
whose paper compares with a plain twin of the same size has that as well. `error` is the largest difference from the outputs as trained, relative to
the largest output. Times are medians in milliseconds with quartiles; ratios are time of the best rival / this: above 1, this is faster.
--small runs the small images of the tests: to see that all works, not to measure.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.yardstick import dense_forms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from models.pretrained import NotInstalledError
from models.reparam_zoo import EVERY, NETWORKS, Network

BEFORE, HAND, OURS, TWIN = "as trained", "by hand", "sc.reparameterize", "plain twin"
COMPILED = "sc.compile"
Form = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {', '.join(EVERY)}")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for one run of the rounds of one network and batch")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()

    console = Console(width=150)
    measured: dict[str, dict[str, dict[str, object]]] = {}
    for name in arguments.networks.split(","):
        if name not in EVERY:
            parser.error(f"there is no network {name!r}")
        network = EVERY[name]
        for batch in map(int, arguments.batches.split(",")):
            try:
                model, images = network.lived_in(batch, network.small if arguments.small else network.image)
            except NotInstalledError as absent:
                console.print(f"{name}: {absent}")
                break
            forms, notes = forms_of(network, model, images)
            with torch.inference_mode():
                errors = {form: error(forms[f"{BEFORE}, eager"], call) for form, call in forms.items() if not form.startswith(TWIN)}
                timings = interleave(forms, rounds=arguments.rounds, warmup=2, at_most=arguments.seconds)
            console.print(table(f"{name}, {batch} × {tuple(images.shape[1:])}, {torch.get_num_threads()} threads", timings, errors))
            for note in notes:
                console.print(f"  {note}")
            measured.setdefault(name, {})[str(batch)] = {form: {**vars(t), "error": errors.get(form)} for form, t in timings.items()}
            if arguments.json:
                arguments.json.write_text(json.dumps({"machine": machine(), "networks": measured}, indent=2))


def forms_of(network: Network, model: nn.Module, images: Tensor) -> tuple[dict[str, Form], list[str]]:
    """Every form as a call without arguments, and why any is missing."""
    makers: dict[str, Callable[[], nn.Module]] = {BEFORE: lambda: model, HAND: lambda: network.by_hand(model),
                                                  OURS: lambda: sc.reparameterize(model, (images,))}
    if (twin := network.twin) is not None:
        makers[TWIN] = lambda: twin().eval()
    torch._dynamo.reset()  # every network from a clean slate: entries of others would be asked first at each call
    forms: dict[str, Form] = {}
    notes: list[str] = []
    for label, make in makers.items():
        try:
            made = make()
        except Exception as problem:  # noqa: BLE001 — one form that fails must not hide the others
            notes.append(f"{label}: {type(problem).__name__}: {problem}")
            continue
        with torch.inference_mode():  # as it is timed: what dynamo compiled in another mode, it would compile again
            dense, absent = dense_forms(made, (images,), {}, ("eager", "compile"))
        notes += [f"{label}: {warning}" for warning in absent]
        forms |= {f"{label}, {'torch.compile' if 'compile' in name else 'eager'}": call for name, call in dense.items()}
        if images.shape[1] > 1 and label != TWIN:
            forms[f"{label}, eager channels_last"] = channels_last(made, images)
    try:
        compiled = sc.compile(model, (images,), recipe="reparam")
        forms[COMPILED] = lambda: compiled(images)
    except Exception as problem:  # noqa: BLE001
        notes.append(f"{COMPILED}: {type(problem).__name__}: {problem}")
    return forms, notes


def channels_last(model: nn.Module, images: Tensor) -> Form:
    """A copy of the model and the images with the channels innermost, as users do it by one call each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about copies of its own trees
        turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images.to(memory_format=torch.channels_last)
    return lambda: turned(x)


def error(expected: Form, got: Form) -> float:
    a, b = expected(), got()
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return float((a - b).abs().max() / a.abs().max())


def table(title: str, timings: Mapping[str, Timing], errors: Mapping[str, float]) -> Table:
    made = Table(title=title, title_justify="left")
    rivals = [label for label in (BEFORE, HAND, TWIN) if any(form.startswith(label) for form in timings)]
    for column in ("form", "ms", "quartiles", "error", *(f"best {label} / this" for label in rivals)):
        made.add_column(column, justify="left" if column == "form" else "right")
    best = {label: min(t.median for form, t in timings.items() if form.startswith(label)) for label in rivals}
    for form, t in timings.items():
        made.add_row(form, f"{t.median:.2f}", f"{t.low:.2f}–{t.high:.2f}", f"{errors[form]:.1e}" if form in errors else "",
                     *(f"{best[label] / t.median:.2f}" for label in rivals))
    return made


def machine() -> dict[str, object]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(), "processor": platform.machine()}


if __name__ == "__main__":
    main()
