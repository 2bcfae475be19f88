"""Target -> TVM's options for LLVM, by features and never by LLVM's own guess of the host.

A virtual machine may report a processor name whose instruction set is not the one it runs: the features decide, and on Arm the name tunes.
"""

from __future__ import annotations

from typing import Any

from sparsify_compiler.target import FEATURES, Target

TRIPLE = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
BASELINE = "x86-64-v2"  # of every x86: what a feature of ours needs beside itself in LLVM follows
# Kernels are cut for NEON. With SVE LLVM packs selected numbers by COMPACT: kernels that gather then ended with a segmentation fault under qemu,
# for some inputs only (tests/test_matrix.py). Whose fault that is, LLVM's or qemu's, is not known.
UNUSED = ("sve", "sve2")
IMPLIED = {"avx2": ("avx", "bmi", "bmi2", "lzcnt", "movbe"), "avx512f": ("avx512cd",)}


def attributes(target: Target) -> list[str]:
    """LLVM's `mattr`: each known feature switched on or off, so that `mcpu` cannot add one that the machine lacks."""
    switched = [("+" if target.has(feature) and feature not in UNUSED else "-") + feature for feature in FEATURES[target.arch]]
    return switched + [f"+{extra}" for feature in target.features for extra in IMPLIED.get(feature, ())]


def options(target: Target) -> dict[str, Any]:
    """TVM's options for this target."""
    processor = BASELINE if target.arch == "x86_64" else target.mcpu
    return {"kind": "llvm", "mtriple": TRIPLE[target.arch], "mcpu": processor, "mattr": attributes(target)}
