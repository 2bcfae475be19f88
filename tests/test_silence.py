"""What other libraries print stays away from the user, and nothing else does."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest

from sparsify_compiler.silence import without_lines


def test_lines_of_compiled_code_are_dropped_by_their_beginning(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with without_lines(b"Noise"):
        ctypes.CDLL(None).puts(b"Noise::of a library")
        ctypes.CDLL(None).puts(b"a line of C")
        print("a line of Python")
        os.write(1, b"of the system, Noise\n")
    print("after")
    shown = capfd.readouterr().out
    assert "library" not in shown
    assert sorted(shown.splitlines()) == ["a line of C", "a line of Python", "after", "before", "of the system, Noise"]


def test_the_output_comes_back_where_the_inside_fails(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with without_lines(b"Noise"):
            os.write(1, b"kept\n")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    os.write(1, b"and after\n")
    assert capfd.readouterr().out == "kept\nand after\n"


def test_two_threads_do_not_lose_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy() -> None:
        for _ in range(20):
            with without_lines(b"Noise"):
                os.write(1, b"Noise\n")
                os.write(1, b"kept\n")

    threads = [threading.Thread(target=noisy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "kept\n" * 40 + "after\n"


def test_a_closed_output_is_no_error() -> None:
    real = os.dup(1)
    os.close(1)
    try:
        with without_lines(b"Noise"):
            pass
    finally:
        os.dup2(real, 1)
        os.close(real)
