"""Ours: what sc.compile() hands back for the model with its masks, float32 and bfloat16; dense where no kernel pays, as a user gets it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peer_cases import masked
from rich.console import Console

import sparsify_compiler as sc

from ._torch import DTYPES, Call, module


def forms(folder: Path, threads: int, calls: str = "auto", label: str = "ours") -> Iterator[tuple[Any, ...]]:
    """The compiled model in each dtype; what was chosen for each site goes to stderr."""
    torch.set_num_threads(threads)
    for word, dtype in DTYPES.items():
        model, x = module(folder, dtype)
        compiled = sc.compile(masked(model), (x,), recipe=sc.Pipeline.parse("pack() | lower()"), calls=calls)
        chosen = Counter(f"{site.format} by {site.kernel}" for site in compiled.report().sites)
        Console(file=sys.stderr, width=150).print(f"{label} {word}:", *(f"{count} × {what}" for what, count in chosen.items()),
                                                 compiled.report().calls, sep="\n  ", markup=False)
        yield f"{label} {word}", word, Call(compiled, x)
