"""Kernels: from a sparse format and a target to machine code that runs on torch's own threads.

The engine talks to `codegen.runtime` only, and never imports tvm itself.
"""
