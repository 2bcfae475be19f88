"""A remote machine that kernels are timed on, through TVM's RPC: a server there (`python -m tvm.exec.rpc_server`), or a tracker of several.

    with Board.connect(resolve("cortex-a76"), "192.168.0.7:9090") as board:
        times = board.times(laid, x)          # seconds by variant

What the board lacks of the target's features is asked before anything of the target runs there, so that no illegal instruction is met.
"""

from __future__ import annotations

import socket
import statistics
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import Tensor

from sparsify_compiler.codegen import board_features, build
from sparsify_compiler.codegen.laid import Laid
from sparsify_compiler.errors import BoardError, InputError, TargetError
from sparsify_compiler.nearness import distance, near
from sparsify_compiler.target import Target

REACH = 5.0             # seconds within which a machine that is there answers
SESSION = 120           # seconds that a session may last
TRACKER = 0x2F271       # TVM's rpc/base.py
REPEATS = 15
SERVER = "start one there: python -m tvm.exec.rpc_server --host 0.0.0.0 --port 9090"


class Board:
    """A session on a machine that can run a target's code."""

    def __init__(self, target: Target, session: Any, name: str) -> None:
        self.target, self.name, self._session, self._count = target, name, session, 0

    @classmethod
    @contextmanager
    def connect(cls, target: Target, address: str, seconds: int = SESSION) -> Iterator[Self]:
        """A session for so many seconds. `address` is HOST:PORT of a server, or HOST:PORT/KEY of a server with a key or of a tracker.

        Raises InputError for an address that is none, BoardError where nobody answers, TargetError where the board lacks a feature.
        """
        host, port, key = _parsed(address)
        with _errors(address):
            session = _from_tracker(host, port, key, seconds) if _is_tracker(host, port) else _from_server(host, port, key, seconds)
        try:
            board = cls(target, session, address)
            board.check()
            yield board
        finally:
            with suppress(RuntimeError, AttributeError):    # it has ended already
                session.get_function("CloseRPCConnection")()

    def check(self) -> None:
        """Raises TargetError where the board has not all that code for the target needs, or does not say what it has."""
        missing = sorted(set(self.target.features) - self.features())
        if missing:
            raise TargetError(f"the board has no {', '.join(missing)}", where=self.name, hint=f"tune for a target without, not {self.target.name}")

    def features(self) -> set[str]:
        """Of its processor, asked by a kernel of the least that its architecture has. Raises BoardError, TargetError where it does not run such code.

        Not by TVM's own detection: LLVM's misses some on Arm, a board with the runtime alone has none, and over RPC its flags all count as set.
        """
        arch = self.target.arch
        probe = board_features.Probe(arch)
        with _errors(self.name):
            answer = self._tensor(torch.zeros(probe.words, dtype=torch.int64))
            name = self._sent(build.binary(probe, board_features.LEAST[arch]))
        try:
            self._session.load_module(name)["main"](answer)
        except RuntimeError as error:
            raise TargetError(f"the board does not load code of {arch}", where=self.name, hint=str(error).strip().splitlines()[-1]) from error
        return board_features.features_of(arch, answer.numpy().tolist())

    def times(self, laid: Laid, x: Tensor, expected: Tensor, other: Tensor | None = None, between: int = 0) -> dict[str, float]:
        """Seconds of each variant of a laid weight for x [rows, K] (and other [rows, N]); none of those that compute something else.

        expected  y [rows, N], by which they are checked
        between   bytes that are written between two calls, as other layers of a model would read them
        Raises BoardError.
        """
        found = {}
        with _errors(self.name):
            fixed = [self._tensor(tensor) for tensor in laid.prepared.arguments().values()]
            given = [self._tensor(x), *fixed, *([] if other is None else [self._tensor(other)])]
            y = torch.empty_like(expected)
            for variant, schedule in laid.variants.schedules.items():
                module, result = self._loaded(build.binary(schedule, self.target)), self._tensor(y)
                module["main"](*given, result)
                got = torch.from_numpy(result.numpy().astype("float32"))
                if distance(got, expected) <= near(x.dtype):
                    timer = module.time_evaluator("main", self._session.cpu(0), number=1, repeat=REPEATS, cache_flush_bytes=between)
                    found[variant] = statistics.median(timer(*given, result).results)
        return found

    def _loaded(self, code: bytes) -> Any:
        return self._session.load_module(self._sent(code))

    def _sent(self, code: bytes) -> str:
        """The name of a library there."""
        self._count += 1
        name = f"kernel{self._count}.so"
        self._session.upload(bytearray(code), name)
        return name

    def _tensor(self, tensor: Tensor) -> Any:
        """A copy there."""
        from tvm.runtime import empty

        dtype = str(tensor.dtype).removeprefix("torch.")
        data = tensor.detach().contiguous()
        if tensor.dtype is torch.bfloat16:
            import ml_dtypes

            made: Any = data.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            made = data.numpy()
        there = empty(tuple(tensor.shape), dtype, self._session.cpu(0))
        return there.copyfrom(made) or there if tensor.numel() else there


def _parsed(address: str) -> tuple[str, int, str]:
    place, _, key = address.partition("/")
    host, colon, port = place.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InputError(f"{address!r} is no address", where="rpc", hint="give HOST:PORT, or HOST:PORT/KEY")
    return host, int(port), key


def _is_tracker(host: str, port: int) -> bool:
    """Whether a tracker answers there, or a server, which goes away at a tracker's greeting."""
    with socket.create_connection((host, port), REACH) as connection:
        connection.settimeout(REACH)
        connection.sendall(struct.pack("<i", TRACKER))
        try:
            answer = connection.recv(4)
        except ConnectionError:
            return False
        return len(answer) == 4 and struct.unpack("<i", answer)[0] == TRACKER


def _from_server(host: str, port: int, key: str, seconds: int) -> Any:
    from tvm import rpc

    return rpc.connect(host, port, key, session_timeout=seconds)


def _from_tracker(host: str, port: int, key: str, seconds: int) -> Any:
    """A session on one of a tracker's machines of a kind that is free."""
    from tvm import rpc

    tracker = rpc.connect_tracker(host, port)
    queues = tracker.summary()["queue_info"]
    if not queues.get(key, {}).get("free"):
        known = ", ".join(sorted(name for name, queue in queues.items() if queue.get("free"))) or "none"
        raise BoardError(f"no machine {key!r} is free", where=f"{host}:{port}", hint=f"free: {known}")
    return tracker.request(key, session_timeout=seconds, max_retry=1)


@contextmanager
def _errors(address: str) -> Iterator[None]:
    """What sockets and TVM raise, as BoardError."""
    try:
        yield
    except BoardError:
        raise
    except OSError as error:
        raise BoardError(f"cannot be reached: {error}", where=address, hint=SERVER) from error
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        expired = any("TimeoutError" in line for line in said)
        raise BoardError(f"the session {'took too long' if expired else 'ended'}: {said[-1] if said else error!r}", where=address,
                         hint="try again; a key must be the server's own") from error
