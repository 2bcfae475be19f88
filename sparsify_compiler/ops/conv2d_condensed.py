"""conv2d_condensed: a convolution over two dimensions with the matrix of its weight in formats/condensed.py."""

from __future__ import annotations

from sparsify_compiler.formats.condensed import Condensed

from ._conv2d import register
from .linear_condensed import reference as linear_reference

reference, op = register(Condensed, linear_reference)
