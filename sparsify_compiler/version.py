"""The version of the package, and of what its artefacts are stamped with."""

__version__ = "0.1.0"
