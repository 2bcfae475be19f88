"""Planned against uniform, ERK, OWL, greedy, evolutionary and random search: measured quality at measured latency, and a speed-up that is asked for.

    python benchmarks/planning.py build --brown FOLDER --model minilm --out FOLDER     # minutes: prunes, plans, lowers, measures quality
    python benchmarks/planning.py time --out FOLDER                                    # needs the machine for itself: all models take turns
    python benchmarks/planning.py show --out FOLDER
    python benchmarks/planning.py speedup --brown FOLDER --model mpnet --speedup 1.5   # one budget, end to end
    python benchmarks/planning.py quality --brown FOLDER --model minilm --drop 0.05
    python benchmarks/planning.py speedup --brown FOLDER --model smollm2 --decode --speedup 1.5 --structures unstructured --inputs dense

subjects.py tells where models and data come from; quality is that of prune_quality.py, on texts that no method has seen. Every method has the same
repair (OBS), the same calibration, the same structures and the same share of the layers' dense seconds, as predicted: uniform, ERK and OWL take one
structure for all layers, the searches of rivals.py choose among the offers that the solver has, by the same estimates. Lowering is the same for all:
what does not pay stays dense, and keeps its own weights. Latency is that of --sentences of 128 tokens, or of 512 tokens of SmolLM2, against eager
torch. A killed run goes on where --out has got to; where SPARSIFY_CHECKPOINT names a folder, the survey does as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import rivals
import torch
from rich.console import Console
from rich.table import Table
from subjects import LENGTH, MiniLM, MPNet, SmolLM2, Subject, lee, options, smollm2
from torch import fx

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.codegen import runtime
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes.lower.lower import Lower
from sparsify_compiler.passes.lower.pack import Pack
from sparsify_compiler.passes.plan.choose_layers import ChooseLayers
from sparsify_compiler.passes.prune._layers import find_layers
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.plan_loop import took
from sparsify_compiler.program import Program, set_tensor
from sparsify_compiler.quality import output_distance
from sparsify_compiler.survey import SECONDS, Offer, Survey
from sparsify_compiler.target import host
from sparsify_compiler.trials import idle

SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {"minilm": MiniLM, "mpnet": MPNet, "smollm2": SmolLM2}
STRUCTURES = ("16x1", "unstructured")
RULES = tuple(f"{rule} {structure}" for rule in ("uniform", "erk", "owl") for structure in STRUCTURES)
METHODS = ("planned", *RULES, "greedy", "evolutionary", "randomly")
SHARES = (0.85, 0.75, 0.65, 0.55, 0.45)
ROUNDS, WARM, PIECES = 11, 2, 8
OTHERS = {"inputs": "select_inputs()", "bfloat16": "cast_layers()"}  # choices that are no structure of a weight
CORRECTED = 2  # times that a plan is lowered and made again by what was measured of its layers
LOWERING = Pipeline((Pack(), Lower(rounds=7)))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("what", choices=["build", "time", "show", "speedup", "quality"])
    for action in parser._actions:
        action.required = action.required and action.dest != "brown"
    parser.add_argument("--model", choices=list(SUBJECTS), default="minilm")
    parser.add_argument("--out", type=Path, default=Path("planning_out"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), help="of weights; 'inputs': tokens select what they read; 'bfloat16'")
    parser.add_argument("--inputs", choices=["pruned", "dense"], default="pruned", help="of the repair: the pruned model's, or the dense one's")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the layers' dense seconds, that the layers may take")
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--again", choices=["probes", "evener", "never"], default="probes",
                        help="build: how a plan is looked at again: probes around it and evener plans, these alone, or not at all")
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--drop", type=float, default=0.05, help="quality: 1 - cosine, or the rise of SmolLM2's perplexity")
    parser.add_argument("--sentences", type=int, default=8, help="of 128 tokens, that are timed")
    parser.add_argument("--decode", action="store_true", help="of one token, not of a text; speedup: with a cache")
    parser.add_argument("--group", type=int, default=8, help="models that take turns at a time")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    {"build": build, "time": clock, "show": show, "speedup": speedup, "quality": quality}[arguments.what](arguments)


def build(arguments: argparse.Namespace) -> None:
    """Every point of every method: its quality, and the lowered model on disk."""
    subject = SUBJECTS[arguments.model](arguments)
    if arguments.decode:
        subject.capture({"input_ids": {1: "tokens"}})
    out = arguments.out / arguments.model
    out.mkdir(parents=True, exist_ok=True)
    ctx = Context(target=host(), example_inputs=timed(subject, arguments), batches=subject.batches, kernels=runtime)
    ctx.calibrate = lambda program, needs: calibrate(program, subject.batches, needs)
    if not (out / "dense.json").exists():
        (out / "dense.json").write_text(json.dumps({"method": "dense", **subject.measure(subject.model)}))
    start = time.process_time()
    planner = planner_of(arguments)
    survey = planner.survey(subject.captured, ctx)
    dense = survey.as_it_is(SECONDS).cost
    told({"survey": time.process_time() - start, "sites": len(survey.offers), "layers, ms": dense * 1e3})
    for share in arguments.shares:
        for method in arguments.methods:
            if (out / f"{method} {share}.json").exists():
                continue
            mine = replace(survey, scale=dict(survey.scale), _costs=dict(survey._costs))  # what one method found out is not for the others
            if method == "planned":
                taken = planned(planner, mine, share, subject, ctx, arguments.again)
            else:
                taken = rivals.made(method, mine, share * dense, subject.captured, ctx, arguments.structures)
            about = {"method": method, "asked": share, "sentences": arguments.sentences, "words": words(arguments), "lost": lost(mine, taken)}
            keep(subject, ctx, out, f"{method} {share}", survey, taken, about, arguments)


def planned(planner: ChooseLayers, survey: Survey, share: float, subject: Subject, ctx: Context, again: str) -> Mapping[str, Offer]:
    """As compile() does it: plan, look again around the plan, lower, take over what was measured of each layer, and plan again."""
    plan = survey.plan(SECONDS, share * survey.as_it_is(SECONDS).cost)
    if again != "never":
        plan = (planner.refine if again == "probes" else planner.settle)(survey, SECONDS, plan, subject.captured, ctx)
    for _ in range(CORRECTED):
        rows = (plan.pipeline | LOWERING).run(subject.captured, ctx, ()).decisions
        known = {site: rows[site] for site in plan.taken if site in rows}
        survey.correct(SECONDS, {site: seconds for site, row in known.items() if (seconds := took(row))}, plan.taken,
                       {site: row.dense_ms / 1e3 for site, row in known.items() if row.dense_ms})
        before, plan = plan, survey.plan(SECONDS, share * survey.as_it_is(SECONDS).cost)
        if plan.taken == before.taken:
            break
    return plan.taken


def lost(survey: Survey, taken: Mapping[str, Offer]) -> float | None:
    """What an allocation is thought to lose; None of one that lies between the offers."""
    known = all(offer in survey.offers[site] for site, offer in taken.items())
    return survey.lost(taken) if known else None


def timed(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """What latency is measured on."""
    if isinstance(subject, SmolLM2):
        batch = subject.batches[0]
        return {**batch, "input_ids": batch["input_ids"][:, :1]} if arguments.decode else batch
    example: dict[str, Any] = subject.timed  # type: ignore[attr-defined]
    return {name: value[: arguments.sentences] for name, value in example.items()}


def words(arguments: argparse.Namespace) -> int:
    """Of a text that are timed at a time. The first moves SmolLM2 as no other does, and selects far fewer inputs: alone it is no measure of that."""
    return (2 if "inputs" in arguments.structures else 1) if arguments.decode else LENGTH


def planner_of(arguments: argparse.Namespace) -> ChooseLayers:
    choices = [OTHERS.get(structure) or f"mask_weights(score=repair, structure={structure!r}, repair=obs, inputs={arguments.inputs})"
               for structure in arguments.structures]
    return ChooseLayers(choices=tuple(choices), probes=arguments.probes)


def keep(subject: Subject, ctx: Context, out: Path, name: str, survey: Survey, taken: Mapping[str, Offer], about: dict[str, Any],
         arguments: argparse.Namespace) -> None:
    """Prune and lower; layers that do not pay keep their own weights, so that it is done once more without them."""
    start = time.process_time()
    changed = survey.pipeline(taken).run(subject.captured, ctx, ())
    lowered = LOWERING.run(changed, ctx, ())
    for_nothing = idle(lowered)
    if for_nothing and arguments.inputs == "dense" and not {*arguments.structures} & {*OTHERS}:  # no layer was cut by what others gave it
        lowered = LOWERING.run(whole_again(changed, subject.captured, for_nothing), ctx, ())
    elif for_nothing:
        rest = {site: survey.offers[site][0] if site in for_nothing else offer for site, offer in taken.items()}
        lowered = (survey.pipeline(rest) | LOWERING).run(subject.captured, ctx, ())
    compiled = CompiledModel(lowered, host())
    compiled.save(out / f"{name}.model")
    kept = [(row.density, row.shape[0] * row.shape[1]) for row in lowered.decisions.values() if row.kind == "linear"]
    density = sum(share * size for share, size in kept) / sum(size for _, size in kept)
    row = {**about, "density": density, "idle": len(for_nothing), "processor": time.process_time() - start, **subject.measure(compiled)}
    (out / f"{name}.json").write_text(json.dumps(row))
    told(row)


def whole_again(cut: Program, captured: Program, sites: Iterable[str]) -> Program:
    """A masked Program with the weights that some layers had."""
    found = cut.clone()
    for layer in find_layers(captured, tuple(sites), ())[0]:
        for use in layer.uses:
            region, source = found.regions[use.region.path], use.op.kwargs["weight"]
            assert isinstance(source, fx.Node)
            op = region.node(use.op.name)
            op.kwargs = {**op.kwargs, "weight": region.node(source.name)}
            set_tensor(region.module, str(source.target), layer.weight)
            del found.decisions[use.site.path]
    return found


def clock(arguments: argparse.Namespace) -> None:
    """Latency of each saved model beside the dense one, in turn, a few models at a time; what has been timed is left alone."""
    out = arguments.out / arguments.model
    waiting = [file for file in sorted(out.glob("*.json")) if file.stem != "dense" and "ms" not in json.loads(file.read_text())]
    if not waiting:
        return
    group = waiting[: arguments.group]
    about = json.loads(group[0].read_text())
    subject_dense, examples = dense_of(arguments, about["sentences"], about["words"])
    models = {"dense": subject_dense} | {file.stem: sc.load(out / f"{file.stem}.model") for file in group}
    forms = {name: (lambda model=model: [model(**example) for example in examples]) for name, model in models.items()}
    with torch.inference_mode():
        timings = interleave(forms, rounds=ROUNDS, warmup=WARM, at_most=45.0, repeats=1)
    for file in group:
        timing = timings[file.stem]
        row = {**json.loads(file.read_text()), "ms": timing.median, "low": timing.low, "high": timing.high, "dense ms": timings["dense"].median,
               "speedup": timings["dense"].median / timing.median, "threads": torch.get_num_threads()}
        file.write_text(json.dumps(row))
        told({"name": file.stem, "speedup": row["speedup"]})
    told({"left": len(waiting) - len(group)})


def dense_of(arguments: argparse.Namespace, sentences: int, length: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """The dense model, and what is timed: so many times 128 token numbers; for SmolLM2 so many of a text, some texts in turn, or one of 512."""
    from transformers import AutoModel

    drawn = torch.Generator().manual_seed(0)
    if arguments.model == "smollm2":
        model, tokenizer = smollm2(arguments.cache)
        text = tokenizer(lee(), return_tensors="pt").input_ids[:, : PIECES * length]
        tokens = text.view(PIECES, 1, length) if length < LENGTH else torch.randint(1000, 20000, (1, 1, length), generator=drawn)
        return model, [{"input_ids": each, "use_cache": False} for each in tokens]
    place = object.__new__(SUBJECTS[arguments.model]).place(arguments.cache)  # type: ignore[call-overload, type-var, attr-defined]
    model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
    tokens = torch.randint(1000, 20000, (sentences, 128), generator=drawn)
    return model, [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]


def show(arguments: argparse.Namespace) -> None:
    """The curves as a table, and for each planned point the best that a rival reaches at its latency."""
    out = arguments.out / arguments.model
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    clocked = sorted((row for row in rows if "speedup" in row), key=lambda row: (row["method"], row["speedup"]))
    measures = [key for key in rows[0] if key.startswith(("Pearson", "cosine", "perplexity"))]
    table = Table(title=f"{arguments.model}, {clocked[0]['sentences']} sentences, {clocked[0]['threads']} threads" if clocked else arguments.model)
    for column in ("method", "asked", "density", "speed-up", *measures):
        table.add_column(column, justify="left" if column == "method" else "right")
    dense = next(row for row in rows if row["method"] == "dense")
    table.add_row("dense", "", "1.000", "1.00", *[f"{dense[key]:.4f}" for key in measures])
    for row in clocked:
        table.add_row(row["method"], f"{row['asked']:g}", f"{row['density']:.3f}", f"{row['speedup']:.2f}", *[f"{row[key]:.4f}" for key in measures])
    Console(width=110).print(table)
    curves = {row["method"] for row in clocked} - {"planned"}
    for row in [row for row in clocked if row["method"] == "planned"]:
        for key in measures:
            curve_of = {name: [{**dense, "speedup": 1.0}, *[one for one in clocked if one["method"] == name]] for name in sorted(curves)}
            at = {name: quality_at(curve, row["speedup"], key) for name, curve in curve_of.items()}
            rivals = ", ".join(f"{name} {value:.4f}" if value is not None else f"{name} not so fast" for name, value in at.items())
            Console(width=150).print(f"{row['speedup']:.2f} times, {key}: planned {row[key]:.4f}; {rivals}")


def quality_at(curve: list[dict[str, Any]], at: float, key: str) -> float | None:
    """A method's quality at a speed-up, on the line between the points around it; None beyond its fastest point."""
    best = min if key.startswith("perplexity") else max
    points = sorted((row["speedup"], row[key]) for row in curve)
    above = [value for speed, value in points if speed >= at]
    for (slow, before), (fast, after) in pairwise(points):
        if slow <= at <= fast:
            between = before + (after - before) * (at - slow) / (fast - slow) if fast > slow else best(before, after)
            return best([between, *above])  # a faster and better point counts for a slower one as well
    return best(above) if above else None


def compiled_for(subject: Subject, arguments: argparse.Namespace, budget: sc.Budget) -> sc.CompiledModel:
    """One compile() within a budget, by the planner."""
    example, batches = timed(subject, arguments), subject.batches
    if arguments.decode:  # with its cache a model is captured in parts
        example, batches = {"input_ids": example["input_ids"]}, [{"input_ids": batch["input_ids"]} for batch in batches]
    dynamic = {name: {0: "batch", 1: "length"} for name, value in example.items() if isinstance(value, torch.Tensor)}
    return sc.compile(subject.model, example, recipe=Pipeline((planner_of(arguments),)), budget=budget, calibration=batches, dynamic=dynamic,
                      progress=True, decoding="parts")  # of the layers that were planned, not of one library


def speedup(arguments: argparse.Namespace) -> None:
    """A speed-up that is asked for, and what came of it."""
    subject, start = SUBJECTS[arguments.model](arguments), time.perf_counter()
    compiled = compiled_for(subject, arguments, sc.Budget(speedup=arguments.speedup))
    report = compiled.report()
    assert report.plan is not None
    asked = {"asked": arguments.speedup, "measured": report.speedup, "rounds": report.plan.rounds, "solver": report.plan.seconds,
             "gap": report.plan.gap, "wall": time.perf_counter() - start, **{each.name: each.seconds for each in report.passes}}
    told({**asked, **subject.measure(compiled)})
    errors = [abs(row.predicted_ms / row.compiled_ms - 1) for row in report.sites if row.predicted_ms and row.compiled_ms]
    told({"predicted against measured, median error": statistics.median(errors) if errors else None})


def quality(arguments: argparse.Namespace) -> None:
    """A loss of quality that is asked for, and what is lost on texts that nothing of it has seen."""
    subject = SUBJECTS[arguments.model](arguments)
    of_words = isinstance(subject, SmolLM2)
    compiled = compiled_for(subject, arguments, sc.Budget(perplexity_rise=arguments.drop) if of_words else sc.Budget(quality_drop=arguments.drop))
    report = compiled.report()
    assert report.plan is not None
    told({"asked": arguments.drop, "rounds": report.plan.rounds, "speed-up": report.speedup, "held out, with chance": report.plan.lost,
          "held out, 1 - cosine": 1 - min(one.compiled or 0 for one in report.quality)})
    if of_words:
        dense, sparse = subject.measure(subject.model), subject.measure(compiled)
        told({f"{name}, rise": sparse[name] / dense[name] - 1 for name in dense})
        return
    others = output_distance(subject.model, compiled, subject.texts)  # type: ignore[attr-defined]
    told({"other texts, 1 - cosine": max(1 - each.cosine for each in others), **subject.measure(compiled)})


def told(row: dict[str, Any]) -> None:
    Console(stderr=True).print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
