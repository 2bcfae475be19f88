"""A plug-in with the same folders as the package, for test_catalog and test_pipeline."""
