"""The wheel that users install holds every file of the three rooms, and works far from the checkout."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"sparsify_compiler": "sparsify_compiler", "passes": "sparsify_compiler/passes", "codegen": "sparsify_compiler/codegen",
         "cost_models": "sparsify_compiler/cost_models"}
needs_build = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("build", "hatchling"))), reason="needs the packages build and hatchling")


def files_of_the_rooms() -> set[str]:
    """Where each file of the checkout lies in the package."""
    found = set()
    for room, place in ROOMS.items():
        for folder, below, names in os.walk(ROOT / room):
            below[:] = [name for name in below if name != "__pycache__" and not (Path(folder) / name).is_symlink()]
            found |= {f"{place}/{(Path(folder) / name).relative_to(ROOT / room).as_posix()}" for name in names if not name.endswith(".pyc")}
    return found


@pytest.mark.slow
@needs_build
def test_sdist_and_wheel(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "README.md", "pyproject.toml", "tests/conftest.py", "codegen/omp.ll", "passes/recipes/wanda.py"} <= names
    with zipfile.ZipFile(wheel) as packed:
        inside = {name for name in packed.namelist() if not name.split("/")[0].endswith(".dist-info")}
        packed.extractall(tmp_path / "installed")
    assert inside == files_of_the_rooms()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    code = "import sparsify_compiler, sparsify_compiler.passes.lower.lower as l; print(sparsify_compiler.__file__, l.__file__, sep='\\n')"
    where = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(line.startswith(str(tmp_path)) for line in where.splitlines())
    command = [sys.executable, "-m", "sparsify_compiler", "passes"]
    listed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "mask_weights" in listed
