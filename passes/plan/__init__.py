"""Planning: which pass acts on which layer, and how far, within a budget."""
