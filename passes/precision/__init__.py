"""Precision: in which dtype a layer computes."""
