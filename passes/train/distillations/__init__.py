"""Terms of the loss that pull a compressed model towards the dense one, its teacher: one file a loss."""
