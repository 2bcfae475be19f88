"""conv2d_bsr: a convolution over two dimensions with the matrix of its weight in formats/bsr.py."""

from __future__ import annotations

from sparsify_compiler.formats.bsr import Bsr

from ._conv2d import register
from .linear_bsr import reference as linear_reference

reference, op = register(Bsr, linear_reference)
