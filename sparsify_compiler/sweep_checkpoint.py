"""What a sweep has finished, on disk: a file a layer, whole or not there. A killed run that starts again goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .calibrate_cache import fingerprint
from .errors import ArtefactError
from .program import Program
from .storage import atomic_path, read_safetensors, write_safetensors

VARIABLE = "SPARSIFY_CHECKPOINT"


class Checkpoint:
    """The finished layers of one run: this Program, these batches, this work. Another run in the same folder does not see them.

    Raises StorageError where the folder cannot be written.
    """

    def __init__(self, folder: Path, program: Program, batches: Iterable[Any], work: str) -> None:
        digest = hashlib.blake2b(f"{fingerprint(program, batches)} {work}".encode(), digest_size=16).hexdigest()
        self.folder = folder / f"sweep-{digest}"

    def read(self, layer: str) -> dict[str, Tensor] | None:
        """What was stored for a layer, or None."""
        try:
            return read_safetensors(self._file(layer))
        except ArtefactError:
            return None  # not there, or cut off when the machine went down: it is computed again

    def write(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a finished layer."""
        with atomic_path(self._file(layer), parents=True) as file:
            write_safetensors(file, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def _file(self, layer: str) -> Path:
        return self.folder / f"{hashlib.blake2b(layer.encode(), digest_size=12).hexdigest()}.safetensors"


def chosen_folder() -> Path | None:
    """$SPARSIFY_CHECKPOINT, the folder to keep finished layers in; None: nothing is kept."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen) if chosen else None
