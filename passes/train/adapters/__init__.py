"""What is learnt in place of a frozen weight: one file a form."""
