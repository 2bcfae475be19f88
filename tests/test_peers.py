"""The workloads of benchmarks/peers.py: the same in every process, cut as their name says; and the process that is stopped between questions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import peer_report
from peer_cases import Case, build, export, masked, names, restore
from peer_process import Engine, EngineError


def test_names_parse_back_and_differ() -> None:
    every = names()
    assert len(set(every)) == len(every)
    assert [Case.parse(name).name for name in every] == every


@pytest.mark.parametrize(("structure", "density"), [("unstructured", 0.1), ("2:4", 0.5), ("16x1", 0.2), ("dense", 1.0)])
def test_a_chain_is_cut_as_its_name_says(structure: str, density: float) -> None:
    case = Case("96x64", 4, structure, density)
    model, x, layers = build(case)
    again, same, _ = build(case)
    assert torch.equal(x, same)
    assert torch.equal(model(x), again(x))
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    assert len(weights) == layers
    assert {tuple(w.shape) for w in weights} == {(96, 64), (64, 96)}
    assert all(abs(float((w != 0).float().mean()) - density) < 0.01 for w in weights)


@pytest.mark.parametrize("name", ["96x64/4/16x1/0.2", "bert/8/dense/1"])
def test_what_is_exported_comes_back(name: str, tmp_path: Path) -> None:
    case = Case.parse(name)
    export(case, tmp_path)
    model, x = restore(case, tmp_path)
    assert torch.equal(model(x), torch.from_numpy(np.load(tmp_path / "expected.npy")))
    assert (tmp_path / "model.onnx").stat().st_size > 0.99 * sum(p.numel() * 4 for p in model.parameters())  # equal ones are stored once


def test_masks_beside_weights_compute_the_same() -> None:
    model, x, _ = build(Case("96x64", 4, "16x1", 0.2))
    expected = model(x)
    cut = masked(model)
    assert torch.equal(cut(x), expected)
    assert all(hasattr(layer, "weight_mask") for layer in cut if isinstance(layer, nn.Linear))


def test_a_dense_chain_has_no_masks() -> None:
    model, _, _ = build(Case("96x64", 4, "dense", 1.0))
    assert not any(name.endswith("mask") for name, _ in masked(model).named_buffers())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look at the process")
def test_an_engine_sleeps_between_questions_and_says_what_failed() -> None:
    engine = Engine("nowhere", Path(sys.executable), 1, verbose=False)
    try:
        assert engine.ask("forget", []) == {}
        time.sleep(0.05)
        assert Path(f"/proc/{engine.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        with pytest.raises(EngineError, match=r"ModuleNotFoundError|FileNotFoundError"):
            engine.ask("load", "no such folder")
        with pytest.raises(EngineError, match="KeyError"):
            engine.ask("run", "no such form", calls=1)
    finally:
        engine.close()
    with pytest.raises(EngineError, match="ended"):
        engine.ask("forget", [])


def test_ratios_are_taken_round_by_round() -> None:
    class Form:
        def __init__(self, ms: list[float]) -> None:
            self.ms = ms

    assert peer_report.ratio(Form([2.0, 4.0, 8.0]), Form([1.0, 2.0, 4.0])) == "2.00 (2.00–2.00)"
    assert peer_report.ratio(None, Form([1.0])) == "–"


def test_forms_are_of_the_dtypes_that_are_asked_for() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(peer_report.__file__).parent)!r}); from peer_engines._torch import DTYPES; print(*DTYPES)"
    for asked, found in (({}, "fp32 bf16"), ({"PEER_DTYPES": "fp32"}, "fp32"), ({"PEER_DTYPES": "bf16"}, "bf16")):
        environment = {name: value for name, value in os.environ.items() if name != "PEER_DTYPES"} | asked
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout.strip() == found
