"""Calibration results on disk, found by content. Whatever is wrong with the cache, the run goes on without it and says so."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ArtefactError, StorageError
from .program import Program, get_tensor
from .storage import read_safetensors, settled, sha256, write_safetensors, writing

if TYPE_CHECKING:
    from .calibrate_run import Entry, Inputs

VERSION = "1"  # of what the numbers mean; part of every key
KEPT_BYTES = 8 << 30  # older results are removed beyond this


def default_folder() -> Path:
    """$SPARSIFY_CACHE/calibration, or the same in the user's cache folder."""
    chosen = os.environ.get("SPARSIFY_CACHE")
    if chosen:
        return Path(chosen) / "calibration"
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparsify_compiler")) / "calibration"


def fingerprint(program: Program, batches: Iterable[Inputs]) -> str:
    """A digest of all that the statistics depend on: graphs, every tensor they read, the eager parts' code and tensors, the batches."""
    digest = hashlib.blake2b(f"{VERSION} {torch.__version__} {program.text()}".encode(), digest_size=32)
    seen: dict[Any, int] = {}
    for region, node in program.nodes():
        if node.op == "get_attr":
            _add_tensor(digest, get_tensor(region.module, str(node.target)), seen)
    if program.skeleton is not None:
        _add_eager(digest, program.skeleton, seen)
    for batch in batches:
        leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        digest.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                _add_tensor(digest, leaf, {})
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _add_tensor(digest: Any, tensor: Tensor, seen: dict[Any, int]) -> None:
    """Shape, dtype and bytes; of a tensor that was seen before, only which one it was."""
    key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else None
    if key is not None and key in seen:
        digest.update(f"again {seen[key]}".encode())
        return
    seen[key] = len(seen)
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy())


def _add_eager(digest: Any, skeleton: nn.Module, seen: dict[Any, int]) -> None:
    """What stayed eager Python: its structure, the source of its classes, its tensors."""
    digest.update(str(skeleton).encode())
    for kind in sorted({type(module) for module in skeleton.modules()}, key=lambda kind: (kind.__module__, kind.__qualname__)):
        try:
            digest.update(inspect.getsource(kind).encode())
        except (OSError, TypeError):
            digest.update(f"{kind.__module__}.{kind.__qualname__}".encode())
    for name, tensor in skeleton.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            _add_tensor(digest, tensor, seen)


class Cache:
    """Results under one fingerprint, a folder for each group of entries."""

    def __init__(self, folder: Path, key: str, warn: Callable[[str], object]) -> None:
        self.folder, self.key, self.warn = folder, key, warn

    def read(self, entries: Sequence[Entry]) -> dict[Entry, Tensor] | None:
        """The results, or None when they are not there or damaged. They may lie in groups that hold others besides."""
        names = {_name(entry): entry for entry in entries}
        found: dict[Entry, Tensor] = {}
        left = set(names)
        for place, held in chain([(self._place(entries), set(names))], self._others(set(names))):
            tensors = self._read(place, held & left)
            if tensors is not None:
                found |= {names[name]: tensor for name, tensor in tensors.items()}
                left -= held
            if not left:
                return found
        return None

    def _others(self, names: Collection[str]) -> Iterator[tuple[Path, set[str]]]:
        """Groups of which some of these were asked, and which."""
        for manifest in self.folder.glob("*/manifest.json"):
            try:
                told = json.loads(manifest.read_text(encoding="utf-8"))
                held = {*names} & {*told["names"]} if told["key"] == self.key else set()
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if held:
                yield manifest.parent, held

    def _read(self, place: Path, names: Collection[str]) -> dict[str, Tensor] | None:
        """Those of the tensors that a group holds; None of a damaged one."""
        try:
            place = settled(place)
            manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
            if not names or manifest["sha256"] != sha256(place / "statistics.safetensors"):
                return None
            tensors = read_safetensors(place / "statistics.safetensors")
            os.utime(place)
        except (OSError, ValueError, KeyError, TypeError, ArtefactError):
            return None
        return {name: tensor for name, tensor in tensors.items() if name in names}

    def write(self, entries: Sequence[Entry], results: Mapping[Entry, Tensor]) -> None:
        """Keep the results, if that is possible."""
        try:
            with writing(self._place(entries), lambda path: True) as new:
                write_safetensors(new / "statistics.safetensors", {_name(e): t.contiguous() for e, t in results.items()})
                manifest = {"sha256": sha256(new / "statistics.safetensors"), "key": self.key, "names": sorted(map(_name, entries))}
                (new / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            _trim(self.folder)
        except (StorageError, OSError) as error:
            self.warn(f"the calibration cache cannot be used, statistics are gathered anew each time: {error}")

    def _place(self, entries: Sequence[Entry]) -> Path:
        group = json.dumps(sorted(_name(entry) for entry in entries))
        return self.folder / hashlib.blake2b(f"{self.key} {group}".encode(), digest_size=20).hexdigest()


def _name(entry: Entry) -> str:
    (region, node, channel), statistic = entry
    return f"{region}|{node}|{channel}|{statistic}"


def _trim(folder: Path) -> None:
    """Remove the results that were not used for longest, beyond KEPT_BYTES. Another process may do the same at the same time."""
    import shutil

    sizes = {place: sum(f.stat().st_size for f in place.glob("*") if f.is_file()) for place in folder.iterdir() if place.is_dir()}
    total = sum(sizes.values())
    for place in sorted(sizes, key=lambda p: p.stat().st_mtime):
        if total <= KEPT_BYTES:
            return
        shutil.rmtree(place, ignore_errors=True)
        total -= sizes[place]
