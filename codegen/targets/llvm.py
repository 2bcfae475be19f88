"""Target -> tvm.target.Target for LLVM, by features and never by LLVM's own guess of the host.

A virtual machine may report a processor name whose instruction set is not the one it runs: the name tunes, the features decide.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sparsify_compiler.target import FEATURES, Target

# What every machine of the architecture has, and what a feature of ours needs beside itself in LLVM.
BASELINE = {"x86_64": "x86-64-v2", "aarch64": "generic"}
TRIPLE = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
IMPLIED = {"avx2": ("avx", "bmi", "bmi2", "lzcnt", "movbe"), "avx512f": ("avx512cd",)}


def attributes(target: Target) -> list[str]:
    """LLVM's `mattr`: each known feature switched on or off, so that `mcpu` cannot add one that the machine lacks."""
    switched = [("+" if target.has(feature) else "-") + feature for feature in FEATURES[target.arch]]
    return switched + [f"+{extra}" for feature in target.features for extra in IMPLIED.get(feature, ())]


@cache
def tvm_target(target: Target) -> Any:
    """The tvm.target.Target that compiles for `target`."""
    import tvm

    return tvm.target.Target({"kind": "llvm", "mtriple": TRIPLE[target.arch], "mcpu": BASELINE[target.arch],
                              "mattr": attributes(target), "num-cores": target.cores})
