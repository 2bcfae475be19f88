"""Tuning on remote boards through TVM's RPC: a server on this machine stands for one; what is unreachable, busy or lacks a feature is refused."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from arm_emulator import PYTHON, SCRIPTS, needs_emulator, qemu, sysroot
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.cli import main
from sparsify_compiler.codegen import board as boards
from sparsify_compiler.codegen import board_features, cache, runtime, tuned
from sparsify_compiler.codegen.board import Board
from sparsify_compiler.errors import BoardError, InputError, TargetError
from sparsify_compiler.far import far_kernels
from sparsify_compiler.target import FEATURES, Target, host, resolve

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
ELSEWHERE = replace(host(), name="far-away")
RECIPE = sc.recipes.wanda(structure="16x1")


@contextmanager
def process(module: str, *options: str) -> Iterator[str]:
    """HOST:PORT of a server or tracker of TVM in a process of its own."""
    command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", "--port", "19190", "--port-end", "19390", *options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert running.stdout is not None
        line = next(line for line in running.stdout if "bind to" in line)
        threading.Thread(target=running.stdout.read, daemon=True).start()
        address = line.split("bind to ")[1].strip()
        host, _, port = address.rpartition(":")
        for _ in range(100):    # it says so before it listens
            with suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
                break
            threading.Event().wait(0.1)
        yield address
    finally:
        running.kill()
        running.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with process("rpc_server", "--key", "board") as address:
        yield f"{address}/board"


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing for ELSEWHERE runs here, and nothing is known of it yet."""
    runs_on = Target.runs_on
    monkeypatch.setattr(tuned, "PREFIX", "tunedboardtest")
    with monkeypatch.context() as patch:
        patch.setattr(Target, "runs_on", lambda self, other: self.name != "far-away" and runs_on(self, other))
        yield
    for file in cache.folder().glob("tunedboardtest*"):
        file.unlink()


def weight() -> tuple[torch.Tensor, Any]:
    """[32, 64], dense and as the first candidate of the family of lanes."""
    mask = (torch.rand(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32) < 0.3).repeat_interleave(16, 0)
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float32) * mask
    stored = catalog.get("format", "bsr").encode(dense, mask, r=16, c=1)
    found = runtime.candidates("linear_bsr", stored.tensors(), stored.attributes(), torch.float32, (4,), host())
    return dense, next(one for one in found if one.options["family"] == "lanes")


def test_variants_are_timed_there_and_checked(server: str) -> None:
    dense, candidate = weight()
    laid = candidate.lay()
    with Board.connect(host(), server) as board:
        assert set(host().features) <= board.features()
        times = board.times(laid, X, X @ dense.t(), between=1 << 20)
        assert set(times) == set(laid.variants.schedules)
        assert all(0 < seconds < 1 for seconds in times.values())
        assert board.times(laid, X, X @ dense.t() + 1) == {}        # all of them compute something else


@pytest.mark.usefixtures("far")
def test_what_was_measured_there_decides(server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(64, 128)).eval()
    found = sc.tune(net, (X,), recipe=RECIPE, density=0.2, target=ELSEWHERE, calibration=[(X,)], rpc=server)
    assert len(found) == 1
    assert found[0].source.startswith("measured on far-away by RPC, 20")
    assert found[0].key.machine == "far-away"
    best = min(found[0].times, key=lambda name: found[0].times[name])
    tuned.store(replace(found[0], times={name: 1e-6 * (1 + (name != best)) for name in found[0].times}))    # so that it pays
    model = sc.compile(net, (X,), recipe=RECIPE, budget=sc.Budget(density=0.2), target=ELSEWHERE, calibration=[(X,)])
    row, = model.report().sites
    assert row.kernel == best
    assert row.source.startswith("measured on far-away by RPC")
    assert "where nothing was" in row.source
    kernel, = far_kernels(model.program)
    assert kernel.options["variants"] == found[0].options[best]["variants"]
    assert kernel.laid.variants.choose(4) == found[0].options[best]["variants"][0][1]


@pytest.mark.slow
def test_a_tracker_hands_out_its_machines(server: str) -> None:
    pytest.importorskip("tornado")
    with process("rpc_tracker") as tracker, process("rpc_server", "--tracker", tracker, "--key", "pi"):
        for _ in range(50):
            with suppress(BoardError), Board.connect(host(), f"{tracker}/pi") as board:
                assert board.features()
                break
            threading.Event().wait(0.2)     # it registers in a moment
        else:
            pytest.fail("the machine never registered")
        with pytest.raises(BoardError, match=r"no machine 'jetson' is free"), Board.connect(host(), f"{tracker}/jetson"):
            pass


def test_who_does_not_answer(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(BoardError, match=r"cannot be reached(.|\n)*rpc_server"), Board.connect(host(), nobody):
        pass
    with pytest.raises(BoardError, match="the session ended"), Board.connect(host(), server.replace("/board", "/another")):
        pass
    for address in ("nowhere", "host:port", ":9090", "host:99999"):
        with pytest.raises(InputError, match="is no address"), Board.connect(host(), address):
            pass


def test_a_board_that_lacks_a_feature_is_never_asked_to_use_it(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = next((name for name in FEATURES[host().arch] if name not in host().features), None)
    wanted = replace(host(), name="better", features=tuple(sorted({*host().features, lacking or host().features[0]})))
    monkeypatch.setattr(Board, "times", lambda *_: pytest.fail("nothing may run there"))
    with monkeypatch.context() as patch:
        if lacking is None:     # this machine has everything: let it hide something
            patch.setattr(Board, "features", lambda self: set(host().features[1:]))
        with pytest.raises(TargetError, match=r"the board has no [\w-]+"), Board.connect(wanted, server):
            pass
    other = Target("board", "aarch64", "generic", ("neon",), 1) if host().arch == "x86_64" else Target("pc", "x86_64", "x86-64", ("avx2",), 1)
    with pytest.raises(TargetError, match=f"does not load code of {other.arch}"), Board.connect(other, server):
        pass


@pytest.mark.skipif(host().arch != "x86_64", reason="asks an x86 processor")
def test_a_board_says_what_it_has_and_no_more(server: str) -> None:
    with Board.connect(host(), server) as board:
        assert board.features() == set(host().features)


def test_what_the_system_does_not_keep_is_not_there() -> None:
    """As under a hypervisor that hides AVX-512 or tiles from what it runs, though the processor tells of them."""
    everything = [~0] * len(board_features.WORDS)
    assert board_features.features_of("x86_64", [*everything, 0]) == set()
    assert board_features.features_of("x86_64", [*everything, 0b111]) == {"avx2", "fma", "f16c"}
    assert board_features.features_of("x86_64", [*everything, 0b11100111]) == {name for name in FEATURES["x86_64"] if not name.startswith("amx")}
    assert board_features.features_of("x86_64", [*everything, ~0]) == set(FEATURES["x86_64"])
    assert board_features.features_of("x86_64", [0, 1 << 5, 0, 0, 0, ~0]) == {"avx2"}
    assert board_features.features_of("aarch64", [1 << 1 | 1 << 20, 1 << 13]) == {"neon", "dotprod", "i8mm"}


def test_a_session_that_takes_too_long(server: str) -> None:
    with Board.connect(host(), server, seconds=1) as board:
        threading.Event().wait(2.5)
        with pytest.raises(BoardError, match=r"the session|cannot be reached"):
            board.features()


def test_the_command_tells_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(64, 64).eval(), (torch.randn(4, 64),)\n")
    assert main(["tune", f"{tmp_path}/mine.py:make", "--density", "0.2", "--rpc", "127.0.0.1:1", "--quiet"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert boards.SERVER.startswith("start one there")


@contextmanager
def emulated_board(processor: str) -> Iterator[str]:
    """HOST:PORT/KEY of a server in an emulated 64-bit Arm machine, which has TVM's runtime without the compiler."""
    command = [*qemu(processor, PYTHONPATH=sysroot.root() / "site", TVM_USE_RUNTIME_LIB=1), PYTHON, SCRIPTS / "rpc_server.py", "pi"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert running.stdout is not None
        yield f"{running.stdout.readline().split('bind to ')[1].strip()}/pi"
    finally:
        running.kill()
        running.wait()


@pytest.mark.arm
@needs_emulator
def test_an_emulated_board_runs_what_it_can_and_is_not_asked_for_more() -> None:
    dense, candidate = weight()
    refused = pytest.raises(TargetError, match="the board has no dotprod, fullfp16")
    with emulated_board("cortex-a53") as address, refused, Board.connect(resolve("cortex-a76"), address):
        pass
    target = resolve("cortex-a53")
    laid = replace(candidate, target=target).lay()
    with emulated_board("cortex-a53") as address, Board.connect(target, address) as board:
        assert board.features() == {"neon"}
        assert set(board.times(laid, X, X @ dense.t())) == set(laid.variants.schedules)
