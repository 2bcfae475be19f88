"""One engine in a process of its own, driven over a pipe: `python peer_worker.py ENGINE THREADS`. A line of JSON in, a line of JSON out.

{"load": folder}               → {"forms": {name: dtype}, "skipped": {name: why}}     forms of the case in this folder are now ready
{"check": name}                → {"error": e}      largest difference from expected.npy, relative to its largest number
{"run": name, "calls": n}      → {"ms": t}         milliseconds of n calls, after some that are not counted
{"forget": []}                 → {}                drops all forms
An engine is a file of peer_engines/ with forms(folder, threads), which yields (name, dtype, call) or (name, why it cannot run here).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WARM = 0.03  # seconds until a process that was stopped has its caches back and its threads on processors of their own


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints goes to stderr, not between the answers
    worker = Worker(name, threads)
    for line in sys.stdin:
        (command, argument), *rest = json.loads(line).items()
        try:
            answer = getattr(worker, command)(argument, **dict(rest))
        except Exception as error:  # noqa: BLE001 (whatever an engine does, the driver says it and goes on)
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """The forms of one engine, by name."""

    def __init__(self, name: str, threads: int) -> None:
        self.engine, self.threads = name, threads
        self.forms: dict[str, Any] = {}
        self.expected: dict[str, Path] = {}

    def load(self, folder: str) -> dict[str, Any]:
        import numpy as np

        made, skipped = {}, {}
        case = json.loads((Path(folder) / "case.json").read_text())["case"]
        expected = np.load(Path(folder) / "expected.npy")
        for name, *rest in importlib.import_module(f"peer_engines.{self.engine}").forms(Path(folder), self.threads):
            if len(rest) == 1:
                skipped[name] = rest[0]
            else:
                made[name] = rest[0]
                self.forms[f"{case} {name}"], self.expected[f"{case} {name}"] = rest[1], expected
        return {"forms": made, "skipped": skipped}

    def check(self, name: str) -> dict[str, Any]:
        import numpy as np

        got, expected = np.asarray(self.forms[name]()).reshape(-1), self.expected[name]
        return {"error": float(np.abs(got - expected.reshape(-1)).max() / np.abs(expected).max())}

    def run(self, name: str, calls: int) -> dict[str, Any]:
        form, end = self.forms[name], time.perf_counter() + WARM
        form()
        while time.perf_counter() < end:
            form()
        begin = time.perf_counter()
        for _ in range(calls):
            form()
        return {"ms": (time.perf_counter() - begin) * 1e3}

    def forget(self, _: Any) -> dict[str, Any]:
        self.forms.clear()
        self.expected.clear()
        return {}


if __name__ == "__main__":
    main()
