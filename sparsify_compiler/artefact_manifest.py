"""The manifest: what an artefact is, and what each of its files must be."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .errors import ArtefactError
from .storage import sha256
from .version import __version__

FORMAT, VERSION = "sparsify_compiler artefact", 1
MANIFEST = "manifest.json"
AGAIN = "save the model again, or copy the whole folder again"


def versions() -> dict[str, str]:
    """What an artefact is stamped with. TVM's version is read without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        tvm = version("apache-tvm")
    except PackageNotFoundError:
        tvm = ""
    return {"sparsify_compiler": __version__, "torch": str(torch.__version__), "tvm": tvm, "python": platform.python_version()}


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Describe every file of the folder, and the facts, in manifest.json."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    data = {"format": FORMAT, "version": VERSION, "versions": versions(), **facts, "files": files}
    data["digest"] = _digest(data)
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking that it is one and that every file is there, whole and unchanged. Raises ArtefactError otherwise."""
    data = peek(folder)
    if data.get("version") != VERSION:
        raise ArtefactError(
            f"format version {data.get('version')!r}, this sparsify_compiler reads {VERSION}",
            where=str(folder / MANIFEST),
            hint=f"it was written by sparsify_compiler {data.get('versions', {}).get('sparsify_compiler', '?')}: install that one, or compile again",
        )
    if data.get("digest") != _digest(data) or not isinstance(data.get("files"), dict):
        raise ArtefactError("was changed after it was written", where=str(folder / MANIFEST), hint=AGAIN)
    for name, facts in data["files"].items():
        _check_file(folder, name, facts)
    return data


def peek(folder: Path) -> dict[str, Any]:
    """The manifest's content, only checked to be one of ours. Raises ArtefactError when it is not."""
    if not folder.exists():
        raise ArtefactError("no such folder", where=str(folder), hint="give the folder that save() wrote")
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"not an artefact: it holds no {MANIFEST}", where=str(folder), hint="give the folder that save() wrote") from None
    except NotADirectoryError:
        raise ArtefactError("not a folder", where=str(folder), hint="give the folder that save() wrote") from None
    except (ValueError, OSError) as error:
        raise ArtefactError(f"cannot be read: {error}", where=str(folder / MANIFEST), hint=AGAIN) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtefactError("not a manifest of sparsify_compiler", where=str(folder / MANIFEST), hint="give the folder that save() wrote")
    return data


def is_artefact(folder: Path) -> bool:
    """True for a folder that save() may replace: one that it wrote, whole or damaged."""
    try:
        peek(folder)
    except ArtefactError:
        return False
    return True


def _check_file(folder: Path, name: str, facts: Any) -> None:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or not isinstance(facts, dict):
        raise ArtefactError(f"names a file outside of the artefact: {name!r}", where=str(folder / MANIFEST), hint="do not load it")
    path = folder / place
    if not path.is_file():
        raise ArtefactError("is missing", where=str(path), hint=AGAIN)
    size = path.stat().st_size
    if size != facts.get("bytes"):
        raise ArtefactError(f"has {size} bytes instead of {facts.get('bytes')}", where=str(path), hint=AGAIN)
    if sha256(path) != facts.get("sha256"):
        raise ArtefactError("was changed or damaged: its sha256 is not the manifest's", where=str(path), hint=AGAIN)


def _digest(data: dict[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
