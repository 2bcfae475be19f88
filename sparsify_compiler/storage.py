"""Files that are either whole or not there: folders written beside and renamed into place, hashes, safetensors without a second copy in memory.

Replacing a folder takes two renames (old away, new in). A process killed between them leaves `.<name>.old` beside an empty place; whoever
reads or writes the folder next finds it there: `settled` for readers, `writing` for writers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .errors import ArtefactError, StorageError

# safetensors' names of dtypes; any other dtype is stored as bytes, and the graph file says what they are.
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
LOCK_SECONDS = 600.0
CHUNK = 1 << 22


@contextmanager
def writing(path: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and vanishes when it does not.

    One writer at a time for a path, across processes. What stood at `path` is replaced when `replaceable(path)` says so (an empty
    folder always is). Raises StorageError when the place is taken, locked, read-only or full.
    """
    path = Path(os.path.realpath(path))
    with _storage_errors(path), _lock(path):
        made = _make_parents(path.parent)
        new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        try:
            _settle(path, new, old)
            if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or replaceable(path))):
                raise StorageError("something else is there already", where=str(path), hint="choose a new folder, or remove this one yourself")
            new.mkdir()
            yield new
            _sync_tree(new)
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
            _sync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not path.exists():
                os.rename(old, path)
            for folder in made:
                _remove_if_empty(folder)
            raise


def settled(path: Path) -> Path:
    """Where the folder really is: `path`, or the copy that a writer killed between two renames left beside it."""
    path = Path(os.path.realpath(path))
    old = path.with_name(f".{path.name}.old")
    return old if not path.exists() and old.is_dir() else path


def write_file(path: Path, data: bytes | str) -> None:
    """One file, whole or not at all. Raises StorageError when it cannot be written."""
    with atomic_path(path) as file:
        file.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: Path, parents: bool = False) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends well and vanishes when it does not. Raises StorageError.

    parents  make its folder where there is none
    """
    with _storage_errors(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            _sync_file(name)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], aligned: int = 8) -> None:
    """Contiguous CPU tensors as a safetensors file, one at a time; those of wider elements come first, so that each is aligned to its own.

    aligned  bytes at a multiple of which the first tensor starts, and all others that come before those whose size is none

    The library's own writer holds every tensor's bytes at once, which would break the bound on peak memory, and reports a full disk as
    an error of its own.
    """
    header: dict[str, object] = {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (aligned > 8 and item[1].nbytes % aligned > 0, -item[1].element_size()))
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % aligned)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                flat = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
                for start in range(0, len(flat), CHUNK):
                    file.write(flat[start : start + CHUNK])


def read_safetensors(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own (aligned for vector loads; the file may be removed afterwards).

    mapped  leave in the file what can be (see map_safetensors): nothing of it is read before it is asked for

    Raises ArtefactError when it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            left = map_safetensors(path) if mapped else {}
            return {name: left[name] if name in left else file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"not a readable safetensors file: {error}", where=str(path), hint="save the model again") from error


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that read_safetensors has read, left where they are: pages are read when they are touched.

    They stay what they are when the file is removed or replaced (never when it is changed in place), and writing to one does not change it.
    Tensors that do not lie at a multiple of their elements' size, as other writers leave them, and empty ones are not among them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    dtypes = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    made: dict[str, Tensor] = {}
    for name, about in header.items():
        dtype = dtypes.get(about.get("dtype")) if name != "__metadata__" else None
        first, last = about.get("data_offsets", (0, 0))
        if dtype is not None and last > first and (start + first) % dtype.itemsize == 0:
            made[name] = whole[start + first : start + last].view(dtype).view(about["shape"])
    return made


def mapped_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in a temporary file that only they hold (see map_safetensors). Raises StorageError where it cannot be written."""
    with _storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        file = Path(folder) / "tensors.safetensors"
        write_safetensors(file, {name: tensor.contiguous() for name, tensor in tensors.items()})
        return map_safetensors(file)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time for a path. The file lies in the system's temporary folder: nothing is left beside the artefact."""
    from filelock import FileLock, Timeout

    owner = os.getuid() if hasattr(os, "getuid") else 0
    name = f"sparsify-{owner}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.lock"
    try:
        with FileLock(Path(tempfile.gettempdir()) / name, timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise StorageError(
            f"another process has been writing here for {LOCK_SECONDS:.0f} s", where=str(path), hint="wait for it, or end it"
        ) from error


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Any OSError as a StorageError that names the place."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror or error}", where=str(path), hint="check the free space and the permissions there"
        ) from error


def _settle(path: Path, new: Path, old: Path) -> None:
    """Clean up after a writer that was killed: bring the old folder back if no new one took its place, drop unfinished work."""
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _make_parents(folder: Path) -> list[Path]:
    """Create the folder; the ones that were missing, deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
    return missing


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_file(os.path.join(root, name))
        _sync_folder(Path(root))


def _sync_file(path: str) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
