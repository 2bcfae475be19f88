"""Keeping what other libraries log, print and warn of away from the user."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silenced(*loggers: str, below: int = logging.CRITICAL) -> Iterator[None]:
    """Nothing is printed or warned of, and these loggers say nothing below a level: what matters of it is in what is raised."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    try:
        for logger in found:
            logger.setLevel(below)
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
