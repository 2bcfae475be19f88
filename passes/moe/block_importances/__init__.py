"""How much a residual block matters, so that the others may be routed around: one file each."""
