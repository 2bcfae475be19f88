"""Budgets: how a total density is shared out over the layers. One file an allocator: a function of its name."""
