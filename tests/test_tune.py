"""Tuning: kernels raced against each other, what was found kept on disk, and compiles that try what is worth trying only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.cli import main
from sparsify_compiler.codegen import cache, runtime, tuned
from sparsify_compiler.codegen.bound import BoundKernel
from sparsify_compiler.codegen.laid import chosen_by, elsewhere, workers
from sparsify_compiler.codegen.tuned import Key, Record
from sparsify_compiler.errors import ArtefactError, InputError, ParseError, StorageError, TargetError
from sparsify_compiler.measure import Timing
from sparsify_compiler.passes.lower import _tuning
from sparsify_compiler.passes.lower.lower import Lower
from sparsify_compiler.target import fingerprint, host, resolve

RECIPE = sc.recipes.wanda(structure="unstructured")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No tuned results but those of the test, beside the kernels that other tests have built."""
    prefix = f"tuned{os.getpid()}{time.monotonic_ns()}"
    monkeypatch.setattr(tuned, "PREFIX", prefix)
    monkeypatch.setattr(cache, "_warnings", {})
    monkeypatch.setattr(_tuning, "LAPS", ((3, 1.5), (3, None)))
    yield prefix
    for file in cache.folder().glob(f"{prefix}*"):
        file.unlink()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def tune(**options: Any) -> list[Record]:
    return sc.tune(network(), (X,), recipe=RECIPE, density=0.2, calibration=[(X,)], dynamic={"input": {0: "batch"}}, **options)


def key(**changes: Any) -> Key:
    given: dict[str, Any] = {"op": "linear_bsr", "shape": (384, 1536), "rows": 128, "density": 0.3, "attributes": {"r": 16, "c": 1}, "chain": "",
                             "dtype": "float32", "target": host(), "threads": 2}
    return Key.of(**{**given, **changes})


def record(**times: float) -> Record:
    return Record(key(), {"dense eager": 1.0, **times}, ("dense eager", "packed"))


def test_what_loses_early_is_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"dense eager": 20.0, "packed": 9.0, "slow packed": 15.0, "fast": 4.0, "close": 4.4, "slow": 5.0, "slower": 7.0}
    laps: list[tuple[int, list[str]]] = []

    def interleave(forms: Any, rounds: int, **_: Any) -> dict[str, Timing]:
        laps.append((rounds, list(forms)))
        return {name: Timing(seconds[name], seconds[name], seconds[name]) for name in forms}

    monkeypatch.setattr(_tuning, "interleave", interleave)
    forms: dict[str, Any] = dict.fromkeys(seconds, lambda: None)
    times = _tuning.race(forms, {"dense eager", "packed", "slow packed"})
    assert {name: timing.median for name, timing in times.items()} == seconds
    second = ["dense eager", "packed", "fast", "close", "slow"]
    assert [names for _, names in laps] == [list(seconds), second, second[:-1]]
    assert [rounds for rounds, _ in laps] == [3, 5, 12]


def test_what_was_found_is_tried_next_time_and_nothing_else(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune()
    assert {one.key.op for one in found} <= {"linear_bitmap", "linear_csr"}
    assert len(found) == 2
    for one in found:
        assert "dense eager" in one.dense
        assert any(name not in one.dense for name in one.times)
        assert one.source.startswith("measured 20")
    assert tune() == []                                 # known already
    bound: list[str] = []
    bind = runtime.Candidate.bind
    monkeypatch.setattr(runtime.Candidate, "bind", lambda self, bias=None: bound.append(self.name) or bind(self, bias))
    worth = {name.partition(" + ")[0] for one in found for name in one.times if one.worth(name)}
    model = sc.compile(network(), (X,), recipe=RECIPE, budget=sc.Budget(density=0.2), calibration=[(X,)], dynamic={"input": {0: "batch"}})
    assert set(bound) <= worth
    assert 0 < len(bound) < sum(len(one.times) for one in found)
    compiled = model(X)
    bound.clear()
    monkeypatch.setattr(cache, "read", lambda key, read=cache.read: None if key.startswith("tuned") else read(key))
    plain = sc.compile(network(), (X,), recipe=RECIPE, budget=sc.Budget(density=0.2), calibration=[(X,)], dynamic={"input": {0: "batch"}})
    assert len(bound) > 2
    torch.testing.assert_close(compiled, plain(X), rtol=1e-4, atol=1e-5)


def test_a_search_that_stops_goes_on_where_it_was(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = _tuning._tuned, []

    def interrupted(offer: Any, *rest: Any) -> None:
        if done:
            raise KeyboardInterrupt
        real(offer, *rest)
        done.append(offer.key)

    monkeypatch.setattr(_tuning, "_tuned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune()
    assert [one.key for one in tuned.records()] == done
    monkeypatch.setattr(_tuning, "_tuned", real)
    assert done[0] not in [one.key for one in tune()]
    assert len(list(tuned.records())) == 2


def test_layers_of_one_class_are_tuned_once_and_again_where_that_is_asked(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_for: list[Key] = []
    monkeypatch.setattr(_tuning, "_tuned", lambda offer, *_: tuned_for.append(offer.key) or tuned.store(Record(offer.key, {}, ())))
    alike = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval()
    for again, times in ((False, 1), (False, 1), (True, 2)):
        sc.tune(alike, (X,), recipe=RECIPE, density=0.2, calibration=[(X,)], again=again)
        assert len(tuned_for) == times
    assert len(set(tuned_for)) == 1
    assert tuned_for[0].machine == fingerprint()    # of this one by what it is: a record is of no use on another that is called native


def test_progress_tells_how_far_it_is(database: str) -> None:
    told: list[tuple[str, int, int]] = []
    tune(progress=lambda what, done, total: told.append((what, done, total)))
    assert [(done, total) for what, done, total in told if what == "tune"] == [(0, 2), (1, 2), (2, 2)]


def test_results_travel_as_a_file(database: str, tmp_path: Path) -> None:
    one = record(bsr_r16v1=0.5)
    tuned.store(one)
    assert sc.export_tuned(tmp_path / "all.json") == 1
    for file in cache.folder().glob(f"{database}*"):
        file.unlink()
    assert tuned.find(one.key) is None
    assert sc.import_tuned(tmp_path / "all.json") == 1
    assert tuned.find(one.key) == one
    assert main(["tune", "--export", str(tmp_path / "again.json")]) == 0
    assert main(["tune", "--import", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "all.json").read_text())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "others", "version": 1, "records": []}',
                                  '{"format": "sparsify_compiler tuned results", "version": 9, "records": []}',
                                  '{"format": "sparsify_compiler tuned results", "version": 1, "records": [{"times": {"a": "soon"}}]}'])
def test_files_that_are_none_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ArtefactError):
        sc.import_tuned(tmp_path / "bad.json")
    assert main(["tune", "--import", str(tmp_path / "bad.json")]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_full_disk_is_a_warning_and_an_import_that_fails_says_so(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(bsr_r16v1=0.5)
    tuned.store(one)
    sc.export_tuned(tmp_path / "all.json")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    tuned.store(record(bsr_r16v1=0.4))
    assert any("No space left" in warning for warning in cache.warnings())
    assert tuned.find(one.key) == one               # the older one is whole
    with pytest.raises(StorageError, match="No space left"):
        sc.import_tuned(tmp_path / "all.json")


def test_several_may_write_at_once(database: str) -> None:
    def write(number: int) -> None:
        for time_ms in range(5):
            tuned.store(record(bsr_r16v1=float(number * 100 + time_ms)))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        found = tuned.find(key())
        seen += found is not None and set(found.times) == {"dense eager", "bsr_r16v1"}
    assert seen
    assert cache.warnings() == ()


def test_layers_of_about_the_same_size_share_a_result() -> None:
    assert key(shape=(400, 1500), rows=120) == key()
    assert key(density=0.32) == key()
    for other in ({"rows": 4}, {"rows": 3}, {"density": 0.1}, {"dtype": "bfloat16"}, {"chain": " + gelu"}, {"threads": 1}, {"op": "linear_csr"},
                  {"attributes": {"r": 8, "c": 1}}, {"target": resolve("cortex-a76")}, {"shape": (768, 1536)}):
        assert key(**other) != key(), other
        assert key(**other).name != key().name
    changed = replace(key(), text="other kernels")
    assert changed.name != key().name
    assert key().shown == (362, 1448, 128)


def test_what_is_worth_trying() -> None:
    one = record(packed=0.8, fast=0.3, near=0.32, slow=0.6)
    assert [name for name in ("dense eager", "packed", "fast", "near", "slow", "new") if one.worth(name)] == ["dense eager", "packed", "fast", "near",
                                                                                                             "new"]


def test_every_cut_of_the_space_computes_the_same() -> None:
    r = 2
    mask = (torch.rand(48 // r, 70, generator=torch.Generator().manual_seed(1), dtype=torch.float32) < 0.3).repeat_interleave(r, 0)
    weight = torch.randn(48, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float32) * mask
    stored = catalog.get("format", "bsr").encode(weight, mask, r=r, c=1)
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    found = [one for one in runtime.candidates("linear_bsr", stored.tensors(), stored.attributes(), torch.float32, (5,), host())
             if one.options["family"] == "lanes"]
    others = runtime.space(found)
    assert len(others) >= 1
    assert not {one.name for one in others} & {one.name for one in found}
    for one in [*found, *others]:
        torch.testing.assert_close(one.bind()(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_variants_are_chosen_as_they_were_measured() -> None:
    mask = torch.ones(32, 16, dtype=torch.bool)
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    stored = catalog.get("format", "bsr").encode(weight, mask, r=16, c=1)
    one = next(one for one in runtime.candidates("linear_bsr", stored.tensors(), stored.attributes(), torch.float32, (4,), host())
               if one.options["family"] == "lanes")
    laid = one.lay()
    table = [[2, "panel1-alone"], [4, "never-heard-of"], [8, "rows-together"]]
    chosen = chosen_by(laid, table).variants.choose
    assert [chosen(rows) for rows in (1, 2, 3, 8)] == ["panel1-alone", "panel1-alone", "rows-together", "rows-together"]
    assert chosen(64) == laid.variants.choose(64)
    kernel = replace(one, options={**one.options, "variants": table}).bind()
    assert isinstance(kernel, BoundKernel)
    assert kernel.options["variants"] == table         # an artefact keeps it
    assert kernel.laid.variants.choose(1) == "panel1-alone"
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    for variant in laid.variants.schedules:
        torch.testing.assert_close(kernel.by(variant, x), kernel(x), rtol=1e-4, atol=1e-5)


def test_a_variant_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the family chooses is what the others are held against; a wrong one is never the fastest."""
    laid = SimpleNamespace(variants=SimpleNamespace(choose=lambda rows: "usual", schedules=("usual", "right", "wrong")))
    off = {"usual": 0.0, "right": 1e-5, "wrong": 0.01}
    raced: list[str] = []

    def race(runs: dict[str, Any], dense: set[str]) -> dict[str, Timing]:
        raced.extend(runs)
        return {name: Timing(*3 * (1.0 if name == "usual" else 0.5,)) for name in runs}

    monkeypatch.setattr(_tuning, "race", race)
    x = torch.ones(2, 4, dtype=torch.float32)
    kernel = SimpleNamespace(out_features=3, by=lambda name, x, other: torch.full((2, 3), 5.0, dtype=torch.float32) * (1 + off[name]))
    assert _tuning._fastest(kernel, laid, x, adds=False) == "right"
    assert raced == ["usual", "right"]


def test_a_weight_cut_in_another_way_is_laid_out_anew() -> None:
    weight, mask = torch.ones(32, 16, dtype=torch.float32), torch.ones(32, 16, dtype=torch.bool)
    stored = catalog.get("format", "bsr").encode(weight, mask, r=16, c=1)
    shared: runtime.Layouts = {}
    options = {"family": "lanes", "vectors": 1, "dtype": "float32"}
    laid = [runtime.lay("linear_bsr", {**options, "r": r}, stored.tensors(), stored.attributes(), None, host(), shared).prepared for r in (16, 8, 16)]
    assert [made.layout.r for made in laid] == [16, 8, 16]
    assert laid[0] is laid[2]


def test_what_runs_without_torch_counts_on_every_core() -> None:
    machine = replace(host(), cores=7)
    assert workers(machine) == torch.get_num_threads()
    with elsewhere():
        assert workers(machine) == 7


def test_bad_input(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TargetError, match="not this machine"):
        sc.tune(network(), (X,), target="cortex-a76" if host().arch == "x86_64" else "x86-avx2")
    with pytest.raises(ParseError, match="tune is"):
        Lower(tune="twice")   # type: ignore[arg-type]
    assert main(["tune"]) == 2
    assert InputError.__name__ not in capsys.readouterr().err


def test_the_command_says_what_it_found(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent("""
        import torch
        def make():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(64, 96)).eval(), (torch.randn(4, 64),)
    """))
    assert main(["tune", f"{tmp_path}/mine.py:make", "--density", "0.2", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "1 kinds of layers tuned" in text
    assert "linear_" in text


@pytest.mark.slow
def test_a_killed_search_keeps_what_it_found(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import torch, sparsify_compiler as sc
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 256), torch.nn.Linear(256, 512)).eval()
        x = torch.randn(4, 64)
        show = lambda what, done, total: print(what, done, flush=True)
        print(len(sc.tune(net, (x,), recipe="wanda", density=0.2, calibration=[(x,)], progress=show)), "found", flush=True)
    """)
    environment = {**os.environ, "SPARSIFY_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.strip() == "tune 1":
            first.send_signal(signal.SIGKILL)
            break
    first.wait()
    second = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert "2 found" in second.stdout
