"""A worker process that is stopped whenever it is not asked something: peer_worker.py is its other end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any


class EngineError(Exception):
    """The engine failed at what it was asked, or its process ended."""


class Engine:
    """One engine. Only between a question and its answer does its process run."""

    def __init__(self, name: str, python: Path, threads: int, verbose: bool) -> None:
        self.name = name
        here = Path(__file__).resolve().parent
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        # python itself, not what its link points at: the link is how it knows its environment
        self.process = subprocess.Popen([os.path.abspath(python), str(here / "peer_worker.py"), name, str(threads)], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if verbose else subprocess.DEVNULL,
                                        text=True, bufsize=1, start_new_session=True)

    def ask(self, command: str, argument: Any, patience: float = 300, **more: Any) -> dict[str, Any]:
        """The answer to {command: argument, ...}. Raises EngineError where it is a failure, or does not come in `patience` seconds."""
        if self.process.poll() is not None:
            raise EngineError(f"its process ended with {self.process.returncode}")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({command: argument} | more) + "\n")
            if not select.select([self.process.stdout], [], [], patience)[0]:
                self._signal(signal.SIGKILL)
                raise EngineError(f"no answer in {patience:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"its process ended with {self.process.wait()}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EngineError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process and whatever it has started."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
