"""Kill it, fill its disk, run it twice: what was there stays, or the new is there, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_help import small
from torch import nn

from sparsify_compiler import artefact, storage
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ArtefactError, SparsifyError, StorageError
from sparsify_compiler.report import Report

HERE = Path(__file__).parent

# Forks one child for each step of a save; the child counts its calls of the system and kills itself, as kill -9 does, at that step.
KILLED = """
    import os, shutil, signal, sys, torch
    from pathlib import Path
    torch.set_num_threads(1)  # a forked child must not wait for OpenMP threads that it does not have
    from artefact_help import small
    from sparsify_compiler import artefact, storage
    from sparsify_compiler.errors import ArtefactError
    import filelock, sparsify_compiler.report.model
    folder, replacing = Path(sys.argv[1]), sys.argv[2] == "replacing"
    model, new = small(), small()
    new.report().model = "new"
    model.report().model = "old"
    STEPS = [(os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")]

    def die_at(step):
        count = 0
        def wrapped(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        for owner, name in STEPS:
            setattr(owner, name, wrapped(getattr(owner, name)))
        return lambda: count

    outcomes = []
    for step in range(1, 100):
        place = folder / str(step) / "model"
        if replacing:
            model.save(place)
        child = os.fork()
        if child == 0:
            die_at(step)
            new.save(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = artefact.load(place).report().model if storage.settled(place).exists() else "nothing"
        outcomes.append(found)
        assert found in (("old", "new") if replacing else ("nothing", "new")), (step, found)
        if found != "nothing":
            assert artefact.load(place)(torch.zeros(2, 4)).shape == (2, 3)
        model.save(place)  # the next save cleans up, and what it saves is there
        assert artefact.load(place).report().model == "old"
        assert [p.name for p in place.parent.iterdir()] == ["model"], list(place.parent.iterdir())
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    print(step, *sorted(set(outcomes)))
"""

SAVER = """
    import sys
    from artefact_help import small
    model = small()
    for turn in range(int(sys.argv[2])):
        model.report().model = f"{sys.argv[3]}-{turn}"
        model.save(sys.argv[1])
"""


def _script(text: str, *arguments: object) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


@pytest.mark.parametrize("case", ["fresh", "replacing"])
def test_killed_at_any_point_the_old_or_the_new_is_there(case: str, tmp_path: Path) -> None:
    out, err = (process := _script(KILLED, tmp_path, case)).communicate(timeout=120)
    assert process.returncode == 0, err
    steps, *outcomes = out.split()
    assert int(steps) > (8 if case == "fresh" else 12)
    assert outcomes == (["new", "nothing"] if case == "fresh" else ["new", "old"])


def test_two_processes_may_save_at_once(tmp_path: Path) -> None:
    place = tmp_path / "model"
    small().save(place)
    savers = [_script(SAVER, place, 60, name) for name in ("a", "b")]
    seen = set()
    while any(process.poll() is None for process in savers):
        seen.add(artefact.load(place).report().model)
        time.sleep(0.05)
    for process in savers:
        assert process.wait() == 0, process.stderr and process.stderr.read()
    assert artefact.load(place).report().model in ("a-59", "b-59")
    assert len(seen) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@contextmanager
def _files_at_most(size: int) -> Iterator[None]:
    """Writing beyond this many bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, existing: bool) -> None:
    place = tmp_path / "deep" / "model"
    model = small()
    if existing:
        model.report().model = "old"
        model.save(place)
    model.report().model = "new"
    model.report().warnings.append("x" * 50_000)
    with _files_at_most(20_000), pytest.raises(StorageError, match="cannot write"):
        model.save(place)
    if existing:
        assert artefact.load(place).report().model == "old"
        assert [path.name for path in place.parent.iterdir()] == ["model"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        model = small()
        model.save(disk / "model")
        (disk / "filler").write_bytes(b"x" * 30_000)
        model.report().warnings.append("x" * 50_000)
        with pytest.raises(StorageError, match="No space left"):
            model.save(disk / "model")
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "model"]
        assert artefact.load(disk / "model")(torch.zeros(2, 4)).shape == (2, 3)
        with pytest.raises(StorageError, match="No space left"):
            Report(warnings=["x" * 60_000]).to_json(disk / "report.json")
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "model"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only"):
            model.save(disk / "other")
        with pytest.raises(StorageError, match="Read-only"):
            model.save(disk / "model")
        artefact.load(disk / "model")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can write")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        small().save("/proc/sparsify/model")
    with pytest.raises(StorageError):
        Report().to_html("/proc/sparsify.html")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        small().save(tmp_path / "file" / "model")


def test_only_artefacts_are_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="something else is there"):
        small().save(mine)
    with pytest.raises(StorageError, match="something else is there"):
        small().save(mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    small().save(tmp_path / "empty")
    (tmp_path / "empty" / "graph.json").write_text("damaged")
    small().save(tmp_path / "empty")  # a damaged artefact may be replaced
    artefact.load(tmp_path / "empty")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    small().save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = small()
    model.report().model = "new"
    model.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert artefact.load(tmp_path / "real").report().model == "new"


def test_a_graph_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    model = small()
    node = next(node for _, node in model.program.nodes() if node.op == "call_function")
    node.target = print
    with pytest.raises(ArtefactError, match="cannot be saved"):
        model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_never_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.1)
    holder = _script(
        """
        import sys
        from pathlib import Path
        from sparsify_compiler.storage import writing
        with writing(Path(sys.argv[1]), replaceable=lambda path: True):
            print("held", flush=True)
            sys.stdin.read()
    """,
        tmp_path / "model",
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process"):
            small().save(tmp_path / "model")
    finally:
        holder.kill()
        holder.wait()
    small().save(tmp_path / "model")  # a killed holder holds nothing


def test_loading_while_another_process_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is replaced between reading the manifest and reading the files: load looks again."""
    place = tmp_path / "model"
    small().save(place)
    real, turns = artefact.read_manifest, []

    def replaced(folder: Path) -> dict[str, Any]:
        found = real(folder)
        if not turns:
            turns.append(1)
            torch.manual_seed(7)
            other = CompiledModel(small().program)
            other.report().model = "replaced"
            other.save(place)
            raise ArtefactError("is missing", where="weights.safetensors")
        return found

    monkeypatch.setattr(artefact, "read_manifest", replaced)
    assert artefact.load(place).report().model == "replaced"


def test_errors_say_what_to_do() -> None:
    with pytest.raises(SparsifyError) as caught:
        artefact.load("/nonexistent/model")
    assert caught.value.hint
    assert "/nonexistent/model" in str(caught.value)


def test_the_model_is_not_kept_alive_by_its_file(tmp_path: Path) -> None:
    """Overwriting the files of a loaded model does not change it."""
    model = small()
    model.save(tmp_path / "model")
    loaded = artefact.load(tmp_path / "model")
    x = torch.randn(2, 4)
    expected = loaded(x)
    for path in (tmp_path / "model").iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert isinstance(next(loaded.parameters()), nn.Parameter)
