"""Keeping what other libraries log, print and warn of away from the user."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator

_REDIRECTED = threading.Lock()  # there is one standard output in a process


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


@contextlib.contextmanager
def without_lines(beginning: bytes) -> Iterator[None]:
    """What compiled code prints to the standard output meanwhile, without its lines that begin so. All other lines come when it is over."""
    with _REDIRECTED, contextlib.ExitStack() as undo:
        try:
            real = os.dup(1)
        except OSError:  # it is closed, as a service's may be
            yield
            return
        undo.callback(os.close, real)
        caught = undo.enter_context(tempfile.TemporaryFile())
        _flush()
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(real, 1)
            caught.seek(0)
            for line in caught:
                if not line.startswith(beginning):
                    os.write(1, line)


def _flush() -> None:
    """What Python and C hold back for the standard output is written now."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # replaced by something that cannot
        sys.stdout.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # there is no C library under this name
        ctypes.CDLL(None).fflush(None)
