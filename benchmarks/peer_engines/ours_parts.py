"""Ours, called kernel by kernel: what one library of the whole model saves, beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ours


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """The compiled model in each dtype, without its library."""
    return ours.forms(folder, threads, "parts", "ours parts")
