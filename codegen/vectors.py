"""What kernels cut their tiles for: the vector registers of a target, and LLVM IR written by hand for vectors of that many lanes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsify_compiler.target import Target

KERNELS = Path(__file__).with_name("kernels")
WRITTEN = 16    # lanes of the texts
PAIRS = {"x86_64": "avx512bf16", "aarch64": "bf16"}


@dataclass(frozen=True)
class Vectors:
    """Registers of float32.

    lanes       of a register
    count       of registers
    masked      lanes can be left out of loads and stores, and vectors compressed (AVX-512)
    by_element  a multiply-add takes one lane of a register as its factor, and weights are loaded as vectors (NEON); else broadcast from memory
    """

    lanes: int = 16
    count: int = 32
    masked: bool = True
    by_element: bool = False

    @property
    def dot(self) -> str:
        """The functions that multiply pairs of bfloat16, of machines that have an instruction for it: multiplies_pairs()."""
        return (KERNELS / f"dot_bf16{'_arm' if self.by_element else ''}.ll").read_text()

    def text(self, *names: str) -> str:
        """The functions of these files, kernels/<name>.ll, at this width; of what is done otherwise without masks those of <name>_plain.ll."""
        return "".join(_text(name, self.lanes, self.masked) for name in names)


AVX512 = Vectors()


def vectors_of(target: Target) -> Vectors:
    """Those of a target. SVE counts as NEON, which every machine with it has."""
    return Vectors(target.vector_bytes // 4, target.vector_registers, target.has("avx512f"), target.arch == "aarch64")


def multiplies_pairs(target: Target) -> bool:
    """Has it an instruction for products of two bfloat16 each (AVX512_BF16, FEAT_BF16)?"""
    return target.has(PAIRS[target.arch])


@cache
def _text(name: str, lanes: int, masked: bool) -> str:
    masks, plain = KERNELS / f"{name}_masked.ll", KERNELS / f"{name}_plain.ll"
    other = masks if masked else plain
    whole = (KERNELS / f"{name}.ll").read_text() + (other.read_text() if other.exists() else "")
    return whole if lanes == WRITTEN else _narrowed(whole, lanes)


def _narrowed(text: str, lanes: int) -> str:
    """Vectors of 16 and 32 elements of as many or twice as many as there are lanes; masks as words of so many bits."""
    text = re.sub(r"<(16|32) x", lambda found: f"<{int(found[1]) * lanes // WRITTEN} x", text)
    text = re.sub(r"v(16|32)(?=[fip]\d)", lambda found: f"v{int(found[1]) * lanes // WRITTEN}", text)
    text = re.sub(r"<(i\d+) 0((?:, \1 \d+)+)>", lambda found: _counted(found[1], (found[2].count(",") + 1) * lanes // WRITTEN), text)
    text = re.sub(r"(?<=i32 )(%\w+, (?:i32 )?)(16|32)\b", lambda found: f"{found[1]}{int(found[2]) * lanes // WRITTEN}", text)
    text = re.sub(rf"(bitcast <{lanes} x i1> %\w+ to )i16", rf"\g<1>i{lanes}", text)
    return re.sub(r"zext i16 %bits", f"zext i{lanes} %bits", text)


def _counted(kind: str, count: int) -> str:
    return f"<{', '.join(f'{kind} {i}' for i in range(count))}>"
