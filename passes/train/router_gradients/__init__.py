"""How a router learns from a choice that has no gradient: one file an estimator."""
