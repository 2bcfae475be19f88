"""Showing how far a compile is: bars on a terminal, one line a finished step, and now and then one with the time left, elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, int, int], None]
EVERY = 30.0  # seconds between two lines about one long step


@contextmanager
def display(progress: bool | Show) -> Iterator[Show]:
    """A function (what, done, total) to call as steps advance. True shows them on stderr, a function is passed on, False shows nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _lines() -> Show:
    started: dict[str, float] = {}
    told: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        begin = started.setdefault(what, now)
        if 0 < done < total and now - told.setdefault(what, begin) > EVERY:
            told[what] = now
            sys.stderr.write(f"{what}: {done} of {total}, {(now - begin) / done * (total - done):.0f} s left\n")
            sys.stderr.flush()
        if done >= total:
            told.pop(what, None)
            sys.stderr.write(f"{what}: {time.perf_counter() - begin:.1f} s\n")
            sys.stderr.flush()
            del started[what]

    return show
