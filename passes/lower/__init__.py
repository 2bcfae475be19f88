"""From masks to storage formats to kernels."""
