"""What instructions a board has, asked by a kernel of the least that its architecture has: for boards with TVM's runtime without the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit
from sparsify_compiler.host_features import AT_HWCAP, AT_HWCAP2, BITS
from sparsify_compiler.target import Target

CPUID = Path(__file__).parent / "kernels" / "cpuid.ll"
LEAST = {"aarch64": Target("aarch64", "aarch64", "generic", ("neon",), 1), "x86_64": Target("x86-64", "x86_64", "x86-64", (), 1)}
# (leaf, its part, 0 to 3 for eax to edx) of cpuid: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID; volume 1, 13.1.
WORDS = ((1, 0, 2), (7, 0, 1), (7, 0, 2), (7, 0, 3), (7, 1, 0))
WHERE = {"fma": (0, 12), "f16c": (0, 29), "avx2": (1, 5), "avx512f": (1, 16), "avx512dq": (1, 17), "avx512bw": (1, 30), "avx512vl": (1, 31),
         "avx512vnni": (2, 11), "amx-bf16": (3, 22), "amx-tile": (3, 24), "amx-int8": (3, 25), "avx512bf16": (4, 5)}
AVX, AVX512, TILES = 0b110, 0b11100110, 0b110 << 16     # registers that the system keeps


@dataclass(frozen=True)
class Probe:
    """A kernel that asks: y int64 [words] becomes what `features_of` reads."""

    arch: str
    name = "probe"

    @property
    def words(self) -> int:
        return 2 if self.arch == "aarch64" else len(WORDS) + 1

    def compute(self) -> Any:
        """The PrimFunc f(y)."""
        return emit.function("main", self._ask_system if self.arch == "aarch64" else self._ask_processor)

    def _ask_system(self) -> None:
        y = emit.argument((self.words,), "int64")
        for place, word in enumerate((AT_HWCAP, AT_HWCAP2)):
            emit.store(y, emit.external("int64", "getauxval", tirx.IntImm("int64", word)), place)

    def _ask_processor(self) -> None:
        y = emit.argument((self.words,), "int64")
        with emit.llvm(CPUID.read_text()):
            for place, numbers in enumerate(WORDS):
                emit.store(y, emit.external("int64", "cpuid", *(tirx.const(number, "int32") for number in numbers)), place)
            emit.store(y, emit.external("int64", "kept_registers"), len(WORDS))


def features_of(arch: str, words: Sequence[int]) -> set[str]:
    """LLVM's names of those that kernels care for."""
    if arch == "aarch64":
        told = dict(zip((AT_HWCAP, AT_HWCAP2), words, strict=True))
        return {name for name, (word, bit) in BITS.items() if told[word] >> bit & 1}
    kept = words[len(WORDS)]
    needs = {name: TILES if name.startswith("amx") else AVX512 if name.startswith("avx512") else AVX for name in WHERE}
    return {name for name, (word, bit) in WHERE.items() if words[word] >> bit & 1 and kept & needs[name] == needs[name]}
