"""Experts that cost next to nothing, which a row may choose instead of an FFN: one file each."""
