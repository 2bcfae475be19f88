"""Terms of the loss that make activations sparse: one file a loss."""
