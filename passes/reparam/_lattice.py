"""Where the taps of a kernel lie along one spatial dimension, and what composition and sums make of that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Inexact(Exception):  # noqa: N818 — no error of the user's: the reason why two maps have no common one
    """Two maps have no exact common one, and why."""


@dataclass(frozen=True)
class Lattice:
    """The taps of one spatial dimension, at start, start + step, ...: `size` of them; outputs lie `stride` places apart.

    reach says how many outputs there are: (places + reach) // stride + 1.
    """

    start: int = 0
    step: int = 1
    size: int = 1
    stride: int = 1
    reach: int = -1

    @property
    def end(self) -> int:
        """The place of the last tap."""
        return self.start + self.step * (self.size - 1)

    def outputs(self, places: int) -> int:
        return (places + self.reach) // self.stride + 1

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros to put before and after the input (negative: places to drop), so that a conv without padding gives every output."""
        return -self.start, self.reach + 1 + self.end

    def hull(self, other: Lattice) -> Lattice:
        """The lattice that has the taps of both."""
        steps = [one.step for one in (self, other) if one.size > 1]
        step = math.gcd(self.start - other.start, *steps) or 1
        start, end = min(self.start, other.start), max(self.end, other.end)
        return replace(self, start=start, step=step, size=(end - start) // step + 1)

    def places_of(self, other: Lattice) -> Tensor:
        """Where the taps of the other lie among this one's."""
        return (other.start - self.start + other.step * torch.arange(other.size)) // self.step


def compose_lattice(two: Lattice, one: Lattice) -> Lattice:
    """The lattice of a map behind another."""
    steps = [step for step, size in ((one.step, one.size), (one.stride * two.step, two.size)) if size > 1]
    step = math.gcd(*steps) or 1
    span = (one.end - one.start) + one.stride * (two.end - two.start)
    return Lattice(one.stride * two.start + one.start, step, span // step + 1, one.stride * two.stride, one.reach + one.stride * (1 + two.reach))


def spacing(step: int, lattice: Lattice, stride: int = 1) -> int:
    """How many steps of the new lattice lie between two taps of an old one."""
    return 1 if lattice.size == 1 else lattice.step * stride // step
