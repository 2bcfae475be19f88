"""Activations that a trained model's own is replaced with before it is fine-tuned: one file an activation."""
