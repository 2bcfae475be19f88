"""recover() with a checkpoint: runs that were killed go on and end the same, and files that are no state are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import DATA, dense, distance, same, sparse
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler import recover_loop
from sparsify_compiler.errors import ArtefactError, InputError, StorageError
from sparsify_compiler.recovery import Recovery
from sparsify_compiler.storage import read_safetensors


@pytest.mark.parametrize("average", [0.0, 0.8])
def test_a_killed_run_goes_on_and_ends_the_same(average: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_loop, "SAVE_EVERY", -1.0)
    recipe = "mask_weights(score='random', density=0.25) | move_masks(grow='gradient', every=3, until=9)"

    def batches(until: int) -> Iterator[Any]:
        for number in range(until):
            yield DATA[number % 4]
        raise KeyboardInterrupt

    def quality(module: nn.Module) -> float:
        return -distance(module, dense())

    common: dict[str, Any] = {"steps": 12, "rate": 1e-2, "accumulate": 2, "quality": quality, "checks": 6, "patience": 99, "losses": "outputs",
                              "average": average}
    whole, hook, model = sparse(recipe)
    _, expected = sc.recover(whole, model, DATA, hook=hook, **common)
    module, hook, _ = sparse(recipe)
    with pytest.raises(KeyboardInterrupt):  # within a step
        sc.recover(module, model, batches(11), hook=hook, checkpoint=tmp_path / "run", **common)
    module, hook, _ = sparse(recipe)
    _, found = sc.recover(module, model, DATA, hook=hook, checkpoint=tmp_path / "run", **common)
    assert same(whole, module)
    assert [(p.step, p.loss, p.rate, p.quality) for p in found.points] == [(p.step, p.loss, p.rate, p.quality) for p in expected.points]
    assert (found.before, found.best, found.best_step) == (expected.before, expected.best, expected.best_step)
    module, hook, _ = sparse(recipe)
    again, record = sc.recover(module, model, DATA, hook=hook, checkpoint=tmp_path / "run", **common)
    assert (record.steps, record.stopped) == (12, "all steps are done")
    assert same(again, whole)
    with pytest.raises(InputError, match="another model or of other settings"):
        sc.recover(module, model, DATA, hook=hook, checkpoint=tmp_path / "run", **{**common, "steps": 13})
    (tmp_path / "run").write_bytes((tmp_path / "run").read_bytes()[:200])
    with pytest.raises(ArtefactError, match="not a readable"):
        sc.recover(module, model, DATA, hook=hook, checkpoint=tmp_path / "run", **common)


def test_what_a_run_was_without_the_metric_does_not_count(tmp_path: Path) -> None:
    """The metric comes with the second run: what is handed back is the best that it has seen, here the first run's weights."""
    module, hook, model = sparse()
    common: dict[str, Any] = {"minutes": 5, "checkpoint": tmp_path / "run", "losses": "outputs"}
    sc.recover(module, model, iter(DATA[:2]), hook=hook, **common)
    expected = copy.deepcopy(module.state_dict())
    module, hook, _ = sparse()
    falling = iter(range(99, 0, -1))
    _, record = sc.recover(module, model, iter(DATA), hook=hook, quality=lambda trained: float(next(falling)), checks=10**9, **common)
    assert (record.steps, record.before, record.best, record.best_step) == (4, 99, 99, 2)
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_patience_outlives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_loop, "SAVE_EVERY", -1.0)
    module, hook, model = sparse()
    common: dict[str, Any] = {"steps": 100, "checks": 10, "patience": 3, "checkpoint": tmp_path / "run"}
    values = iter([0.5, 0.4, 0.3])

    def killed(trained: nn.Module) -> float:
        found = next(values, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        sc.recover(module, model, DATA, hook=hook, quality=killed, **common)
    module, hook, _ = sparse()
    _, record = sc.recover(module, model, DATA, hook=hook, quality=lambda trained: 0.2, **common)
    assert (record.steps, record.stopped) == (30, "no better for 3 measurements")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_recover_resumed as t
from sparsify_compiler import recover_loop, recover_state
recover_loop.SAVE_EVERY = -1.0
write, count = recover_state.RunFile.write, [0]
def dying(self, *state):
    write(self, *state)
    count[0] += 1
    if count[0] == 5:
        recover_state.write_safetensors = lambda file, tensors: (file.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL))
recover_state.RunFile.write = dying
t.rigl_run(sys.argv[2])
"""


def rigl_run(checkpoint: str | None) -> tuple[nn.Module, Recovery]:
    module, hook, model = sparse("mask_weights(score='random', density=0.25) | move_masks(grow='gradient', every=3, until=9)")
    return sc.recover(module, model, DATA, hook=hook, steps=12, rate=1e-2, checkpoint=checkpoint)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_process_killed_while_it_writes_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle of the sixth save: the fifth is whole, and the second process ends as one that nobody kills."""
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "run")]
    assert subprocess.run(arguments, check=False).returncode == -9
    meta = json.loads(bytes(read_safetensors(tmp_path / "run")["meta"].tolist()))
    assert (meta["record"]["steps"], meta["hook"]) == (5, {"steps": 5})
    module, record = rigl_run(str(tmp_path / "run"))
    whole, expected = rigl_run(None)
    assert same(module, whole)
    assert [(point.step, point.loss) for point in record.points] == [(point.step, point.loss) for point in expected.points]


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module, hook, model = sparse()
    with pytest.raises(StorageError, match="cannot write"):
        sc.recover(module, model, DATA, hook=hook, steps=1, checkpoint=tmp_path / "file" / "run")
    _, record = sc.recover(module, model, DATA, hook=hook, steps=1, checkpoint=tmp_path / "new" / "folder" / "run")
    assert record.steps == 1
    assert (tmp_path / "new" / "folder" / "run").exists()
