"""Machine code on disk, by content: sealed files that are whole or not there, for any number of processes at once.

A file is the SHA-256 of its payload, then the payload; one that does not match is as good as absent. A folder that cannot be written
never fails a compile: what was built is used from memory, and `warnings()` says why.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

DIGEST = 32
LOCK_SECONDS = 600.0
_warnings: dict[str, None] = {}


def folder() -> Path:
    """$SPARSIFY_CACHE, or the user's cache folder."""
    chosen = os.environ.get("SPARSIFY_CACHE")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparsify_compiler"))


def warnings() -> tuple[str, ...]:
    """What went wrong with the cache so far in this process, without harm to any result."""
    return tuple(_warnings)


def read_or_build(key: str, build: Callable[[], bytes]) -> bytes:
    """The payload of `key` from the cache, or from `build`, which is run by one process at a time for a key."""
    from filelock import FileLock, Timeout

    path = folder() / f"{key}.kernel"
    found = _read(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            found = _read(path)
            if found is not None:
                return found
            payload = build()
            _write(path, payload)
            return payload
    except (OSError, Timeout) as error:
        _warnings[f"the kernel cache cannot be used, kernels are built anew in each process: {error}"] = None
        return build()


def read(key: str) -> bytes | None:
    """The payload of `key`, if it was built before."""
    return _read(folder() / f"{key}.kernel")


def write(key: str, payload: bytes) -> bool:
    """Keep a payload under its key, in the place of what was there; whether it was kept. A folder that cannot be written is a warning."""
    from filelock import FileLock, Timeout

    path = folder() / f"{key}.kernel"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            return _write(path, payload)
    except (OSError, Timeout) as error:
        _warnings[f"a result could not be kept: {error}"] = None
        return False


def keys(prefix: str) -> tuple[str, ...]:
    """What there is of a kind."""
    return tuple(sorted(file.stem for file in folder().glob(f"{prefix}-*.kernel")))


def forget(key: str) -> None:
    """Build it anew when it is asked for next."""
    (folder() / f"{key}.kernel").unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    payload = data[DIGEST:]
    return payload if payload and hashlib.sha256(payload).digest() == data[:DIGEST] else None


def _write(path: Path, payload: bytes) -> bool:
    """Beside, then renamed into place: a reader sees all of it or nothing; whether it is. A full disk is a warning. The caller holds the lock."""
    for stale in path.parent.glob(f".{path.stem}.*"):
        stale.unlink(missing_ok=True)
    name = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(name, path)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        _warnings[f"a kernel could not be cached: {error}"] = None
        return False
    return True
