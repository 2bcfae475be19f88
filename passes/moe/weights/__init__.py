"""What the output of a chosen expert is multiplied with: one file a weight."""
