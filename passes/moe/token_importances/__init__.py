"""How much a token matters to a block, so that the others may pass it by: one file each."""
