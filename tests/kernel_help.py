"""Shared by the tests of kernels: which machine may run what."""

from __future__ import annotations

import pytest

from sparsify_compiler.codegen import permission
from sparsify_compiler.codegen.kernels import amx
from sparsify_compiler.target import host

needs_tiles = pytest.mark.skipif(not all(host().has(name) for name in amx.FEATURES) or not permission.tiles(), reason="this machine has no AMX tiles")
