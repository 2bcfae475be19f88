"""Kernels for NVIDIA GPUs: each family of the project, for sm_80 and later, compiled without a GPU at hand."""
