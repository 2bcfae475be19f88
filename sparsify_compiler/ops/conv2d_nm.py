"""conv2d_nm: a convolution over two dimensions with the matrix of its weight in formats/nm.py."""

from __future__ import annotations

from sparsify_compiler.formats.nm import Nm

from ._conv2d import register
from .linear_nm import reference as linear_reference

reference, op = register(Nm, linear_reference)
