"""conv2d_csr: a convolution over two dimensions with the matrix of its weight in formats/csr.py."""

from __future__ import annotations

from sparsify_compiler.formats.csr import Csr

from ._conv2d import register
from .linear_csr import reference as linear_reference

reference, op = register(Csr, linear_reference)
