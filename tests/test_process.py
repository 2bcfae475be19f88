"""compile() is a guest in the user's process: it leaves nothing changed, and does not depend on what it finds."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import sparsify_compiler as sc
from sparsify_compiler.yardstick import dense_forms

PIPELINE = "mask_weights(score=weight_times_input_norm, structure='16x1', density=0.3) | pack() | lower(margin=-1000.0)"


class Partly(nn.Module):
    """Captured in regions: export fails on the whole, prints and warns meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64, dtype=torch.float32), nn.Linear(64, 32, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden) if hidden.sum() < 1e9 else hidden


def state() -> dict[str, Any]:
    """What the whole process shares."""
    loggers = {name: log.level for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger) and log.level}
    return {
        "threads": torch.get_num_threads(), "default dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled, "warnings": list(warnings.filters), "streams": (sys.stdout, sys.stderr), "loggers": loggers,
        "handlers": list(logging.root.handlers), "torch seed": torch.get_rng_state().numpy().tobytes(), "python seed": random.getstate(),
        "numpy seed": np.random.get_state()[1].tobytes(), "environment": dict(os.environ), "path": list(sys.path), "folder": Path.cwd(),
        "recursion": sys.getrecursionlimit(), "denormals": float(torch.tensor(1e-40, dtype=torch.float64).float()) > 0,
    }  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_of_the_process_is_changed(mode: Callable[[], Any]) -> None:
    model, x = Partly().eval(), torch.randn(4, 32)
    sc.compile(model, (x,), recipe=PIPELINE, calibration=[(x,)])  # what is imported the first time may set itself up
    with mode():
        before = state()
        compiled = sc.compile(model, (x,), recipe=PIPELINE, calibration=[(x,)])
        compiled(x)
        after = state()
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model, x = Partly().eval(), torch.randn(4, 32)
    pipeline = PIPELINE.replace("weight_times_input_norm", "random")
    for text in (PIPELINE, pipeline):
        expected = sc.compile(model, (x,), recipe=text, calibration=[(x,)])(x)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(sc.compile(model, (x,), recipe=text, calibration=[(x,)])(x), expected)
        finally:
            torch.set_default_dtype(usual)


SEEDED = """
    import hashlib, json, pathlib, sys, torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[2])
    from models import zoo
    import sparsify_compiler as sc
    from sparsify_compiler.sites import find_sites
    text = "".join(p.text() + repr(find_sites(p)) for p in (zoo.captured(name)[2] for name in ("mixtral", "mixer")))
    model, inputs, _ = zoo.captured("bert")
    pipeline = "mask_weights(score=random, density=0.4, budget=erk) | pack() | lower(margin=1.0)"
    compiled = sc.compile(model, inputs, recipe=pipeline)
    compiled.save(sys.argv[1])
    report = json.loads((pathlib.Path(sys.argv[1]) / "report.json").read_text())
    text += json.dumps([[s["site"], s["density"], s["structure"]] for s in report["sites"]]) + json.dumps(report["misses"])
    for name in ("graph.json", "weights.safetensors"):
        content = (pathlib.Path(sys.argv[1]) / name).read_bytes()
        if name == "graph.json":
            graph = json.loads(content)
            del graph["decisions"]  # which hold measured times
            content = json.dumps(graph).encode()
        text += name + hashlib.sha256(content).hexdigest()
    print(hashlib.sha256(text.encode()).hexdigest(), len(text))
"""


def test_hash_order_does_not_matter(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "SPARSIFY_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", textwrap.dedent(SEEDED), str(tmp_path / seed), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout)
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_what_the_user_compiled_stays_compiled() -> None:
    calls = 0

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal calls
        calls += 1
        return graph.forward

    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    theirs = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        theirs(x)
        torch.compile(model, dynamic=False)(x)  # by inductor too, with weights that are not frozen
        for each in [model, *(nn.Linear(8, 8).eval() for _ in range(9))]:  # more than torch compiles one function again by itself
            forms, problems = dense_forms(each, (x,), {}, ("compile",))
            (form,), before = forms.values(), each(x)
            each.weight.mul_(2)
            torch.testing.assert_close(form(), before, msg="the weights are not frozen")
            each.weight.div_(2)
            assert problems == []
        theirs(x)
    assert calls == 1
