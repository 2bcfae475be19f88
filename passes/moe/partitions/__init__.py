"""Which neurons make an expert: one file a partition."""
