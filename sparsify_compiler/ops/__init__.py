"""Our own ops: one file an op, `torch.ops.sparsify.<file name>`; importing the file registers it."""
