"""What acts while a model is trained: terms of the loss, and numbers that move by schedule. See sc.attach()."""
