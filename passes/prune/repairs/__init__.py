"""Repairs: what mends a layer after its weights were cut. One file a repair: a function of its name, and what it needs (see _base.py)."""
