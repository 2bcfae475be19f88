"""Pruning: score, structure and budget are kept apart; `mask_weights` puts them together."""
