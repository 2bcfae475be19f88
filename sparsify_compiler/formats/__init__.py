"""Storage formats: how a sparse weight is kept as plain tensors. One file a format; nothing is imported until asked for."""
