"""Terms of the loss that act on the routers of experts: one file a loss."""
