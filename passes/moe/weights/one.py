"""One: experts are added up as they are, so that all of them are the dense FFN (MoEfication, arXiv:2110.01786)."""

from __future__ import annotations


def one(experts: int) -> None:
    """Nothing to compute."""
    return
