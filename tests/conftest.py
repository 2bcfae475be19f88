"""Shared by all tests: goldens refreshed by one flag, and a plug-in to look into."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sparsify_compiler import catalog

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", help="run kernels for this target, 64-bit Arm under qemu, wherever tests take this machine's")
    parser.addoption("--update-golden", action="store_true", help="write what the tests got as the new golden texts")


def pytest_configure(config: pytest.Config) -> None:
    # A machine that others compute on says nothing of a law by how long an example takes; examples are as many as ever.
    settings.register_profile("laws", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("laws")
    if name := config.getoption("--target"):
        from arm_emulator import emulated

        machine = emulated(name)
        machine.__enter__()
        config.add_cleanup(lambda: machine.__exit__(None, None, None))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text): the text must be that of tests/golden/<name>.txt; with --update-golden it is written there."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.exists(), f"no golden {file.name}: run pytest --update-golden and review the diff"
        assert text == file.read_text(encoding="utf-8"), "differs from its golden: review, then run pytest --update-golden"

    return compare


@pytest.fixture
def seeded() -> Iterator[None]:
    """The same random numbers in every test, and torch's threads as they were after it."""
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class EntryPoint:
    """As much of importlib.metadata.EntryPoint as the catalogue reads."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """plugins(folder, package): make the package under the folder a plug-in for this test. Without arguments: tests/plugin/sample_plugin."""

    def install(folder: Path = Path(__file__).parent / "plugin", package: str = "sample_plugin") -> None:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(catalog, "entry_points", lambda group: [EntryPoint("test", package)] if group == catalog.PLUGINS else [])
        catalog.refresh()

    yield install
    monkeypatch.undo()
    for module in [name for name in sys.modules if name.startswith("sample_plugin")]:
        del sys.modules[module]
    catalog.refresh()
