"""How experts that share one FFN differ: one file each."""
