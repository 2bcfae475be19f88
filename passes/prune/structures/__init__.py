"""Structures: which weights may be kept together. One file a structure."""
