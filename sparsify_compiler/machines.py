"""The machine that costs are predicted for: this one, as measured once and kept, or one that its data sheet describes."""

from __future__ import annotations

import hashlib
import json
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from . import catalog
from .errors import TargetError, nearest
from .measure import undisturbed
from .target import HERE, NAMES, Target, fingerprint, host, resolve, second_cache

if TYPE_CHECKING:
    from .cost_models.machine import Machine

SOURCE = "measured here, codegen/micro.py"
RUNS, KEPT = 3, 24      # of a measurement, and of earlier ones: what memory gives differs by a third from one minute to the next, with the neighbours


def names() -> tuple[str, ...]:
    """Every name that machine() knows beside those of targets that run here."""
    sheets: tuple[str, ...] = _model().names()
    return (*HERE, *sheets)


def machine(target: str | Target | Machine | None = None) -> Machine:
    """A machine by its name or that of its target; for a Target without a data sheet whose code runs here this machine, with the target's features.

    This machine is measured when it is first asked for (half a minute), and then read from the cache. Raises TargetError.
    """
    model = _model()
    if isinstance(target, str) and target in model.names():
        return model.known(target)  # type: ignore[no-any-return]
    if isinstance(target, str) and target not in NAMES:
        raise TargetError(f"unknown machine {target!r}", where="target", hint=nearest(target, {*names(), *NAMES}))
    if target is None or isinstance(target, str | Target):
        return _of(resolve(target or "cpu"))
    if type(target) is not model.Machine:
        raise TargetError(f"a machine is a name, a Target or a Machine, not {type(target).__name__}", where="target")
    return target


def _of(wanted: Target) -> Machine:
    """The data sheet of a target, or this machine with no other features than the target's."""
    for name in _model().sheets_of(wanted.name):
        sheet: Machine = _model().known(name)
        return replace(sheet, features=wanted.features, cores=wanted.cores)
    if not wanted.runs_on(host()):
        raise TargetError(f"nothing is known of the speed of {wanted.name}", where="target", hint=f"known: {', '.join(names())}")
    here = _host()
    return here if wanted.features == here.features else replace(here, features=wanted.features, costs={})


def nearest_machine(target: Target) -> tuple[Machine, bool]:
    """machine() of a target, and whether it is its own; where nothing is known of that one, the machine of its architecture that is most like it.

    Raises TargetError where there is none.
    """
    sheets = [_model().known(name) for name in _model().names()]
    if _model().sheets_of(target.name) or target.runs_on(host()) or target.arch not in {host().arch, *(sheet.arch for sheet in sheets)}:
        return _of(target), True
    alike = [sheet for sheet in sheets if sheet.arch == target.arch] + ([_host()] if host().arch == target.arch else [])
    found = min(alike, key=lambda sheet: (len(set(sheet.features) ^ set(target.features)), abs(sheet.cores - target.cores)))
    return replace(found, features=target.features, cores=target.cores), False


def measured_host() -> Machine | None:
    """This machine, if it was ever measured; nothing is measured now."""
    from .codegen import cache as store

    return _host() if store.read(_key()) is not None else None


def measure_host() -> Machine:
    """Measure this machine anew: the mean of what it does now and of what it did whenever it was measured. Nothing else should run meanwhile."""
    from .codegen import cache as store

    store.forget(_key())
    _measured.cache_clear()
    return _host()


def keep_costs(costs: Mapping[str, Mapping[str, float]]) -> None:
    """What kernels cost on this machine, for whatever predicts here from now on; in the place of what was kept."""
    from .codegen import cache as store

    store.write(_costs_key(), json.dumps(costs).encode())
    _fitted.cache_clear()


def _host() -> Machine:
    return replace(_measured(_key()), costs=_fitted(_costs_key()))


@cache
def _fitted(key: str) -> Mapping[str, Mapping[str, float]]:
    from .codegen import cache as store

    kept = store.read(key)
    return {} if kept is None else json.loads(kept)


@cache
def _measured(key: str) -> Machine:
    from .codegen import cache as store
    from .codegen import micro

    def measured() -> bytes:
        runs = [undisturbed(lambda: micro.measured(host()), attempts=2) for _ in range(RUNS)]
        if not all(quiet for _, quiet in runs):
            warnings.warn("other programs ran while this machine was measured, predicted times may be far off: "
                          "sparsify targets --measure measures again", stacklevel=2)
        newest = [found for found, _ in runs]
        kept = [*json.loads(store.read(f"{key}-runs") or b"[]"), *newest][-KEPT:]
        store.write(f"{key}-runs", json.dumps(kept).encode())
        return json.dumps(_middle([_middle(newest), _middle(kept)])).encode()

    return _made(json.loads(store.read_or_build(key, measured)))


def _middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of some measurements, the median of each number, of two the mean.

    All cores are no slower than one, what lies farther away comes no faster, and a call after more bytes is no quicker.
    """
    numbers = {name: statistics.median(run["numbers"][name] for run in runs) for name in runs[0]["numbers"]}
    levels = list(zip(*(run["memory"] for run in runs), strict=True))
    memory = [{name: statistics.median(level[name] for level in same) for name in same[0]} for same in levels]
    for level in memory:
        level["all"] = max(level["all"], level["one"])      # where another program had a core, all were as slow as its share
    for near, far in pairwise(memory):
        far.update(one=min(near["one"], far["one"]), all=min(near["all"], far["all"]), cold=max(near["cold"], far["cold"]))
    return {"cores": runs[0]["cores"], "numbers": numbers, "memory": memory}


def _made(found: dict[str, Any]) -> Machine:
    here, units = host(), _model().UNITS
    numbers = {name: {"value": value, "unit": units[name], "source": SOURCE} for name, value in found["numbers"].items()}
    made: Machine = _model().Machine.from_json({
        "name": "native", "title": f"this machine ({here.mcpu}-class, {found['cores']} threads)", "arch": here.arch, "features": here.features,
        "cores": found["cores"], "second_cache": second_cache(here), "numbers": numbers,
        "memory": [{**level, "source": SOURCE} for level in found["memory"]]})
    return made


def _key() -> str:
    """Name in the cache of what was measured: of this machine, with so many threads, by these kernels."""
    import torch

    from .codegen import build, micro

    about = [fingerprint(), torch.get_num_threads(), build.version(), micro.version()]
    return f"machine-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]}"


def _costs_key() -> str:
    """The same of the costs of kernels: of these formulas, too."""
    return f"costs-{hashlib.sha256(json.dumps([_key(), catalog.get('cost model', 'fit').version()]).encode()).hexdigest()[:40]}"


def _model() -> Any:
    return catalog.get("cost model", "machine")
