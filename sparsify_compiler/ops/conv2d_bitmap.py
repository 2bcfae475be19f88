"""conv2d_bitmap: a convolution over two dimensions with the matrix of its weight in formats/bitmap.py."""

from __future__ import annotations

from sparsify_compiler.formats.bitmap import Bitmap

from ._conv2d import register
from .linear_bitmap import reference as linear_reference

reference, op = register(Bitmap, linear_reference)
