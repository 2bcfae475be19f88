"""Activation sparsity: which inputs of a layer are worth reading its weights for, decided anew for every row."""
