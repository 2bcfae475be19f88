"""How masks are learnt on weights that stay: one file a chooser."""
