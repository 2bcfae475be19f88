"""How much each input channel of a layer matters beside its magnitude: one file a scorer."""
