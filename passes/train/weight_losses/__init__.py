"""Terms of the loss that make weights small, so that they can be cut: one file a loss."""
