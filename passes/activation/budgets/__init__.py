"""How the density of inputs is shared out over the layers: one file a budget."""
