"""Recipes: published methods, each a few lines that only compose passes."""
