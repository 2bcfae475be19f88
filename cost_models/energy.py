"""A proxy of energy: joules by the operations and the bytes of a call.

Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9: 45 nm, .9 V. Absolute joules of a machine of today are several times less; what a
budget needs is how a byte from memory and an operation weigh against each other, and that they are far apart has not changed.
"""

from __future__ import annotations

from collections.abc import Mapping

PICO = 1e-12
# Of one operation, half of a multiplication and an addition: 3.7 + .9 pJ in 32 bits, 1.1 + .4 pJ in 16.
OPERATION: Mapping[str, float] = {"float64": 9.2 * PICO, "float32": 2.3 * PICO, "bfloat16": 0.75 * PICO, "float16": 0.75 * PICO}
BYTE = 160 * PICO  # from DRAM: 640 pJ for 32 bits (Han et al., EIE, arXiv:1602.01528, table I, from the same source)


def joules(flops: float, moved: float, dtype: str = "float32") -> float:
    """Of so many operations in a dtype, float32 where nothing is known of it, and bytes read and written."""
    return OPERATION.get(dtype, OPERATION["float32"]) * flops + BYTE * moved
