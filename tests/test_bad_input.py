"""What is wrong with what a user gave: refused by compile() itself, with a typed error that says where and what to do, and nothing touched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.codegen import build, cache
from sparsify_compiler.errors import BudgetError, InputError, ModelError, SelectorError, StructureError, TargetError, UnknownNameError
from sparsify_compiler.target import NAMES, resolve

HERE = Path(__file__).parent
X = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
MASK = "mask_weights(density=0.5"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.Linear(64, 30)).eval()


def with_(change: Callable[[Any], object]) -> nn.Module:
    model = net()
    change(model)
    return model


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    # example inputs
    ({"example_inputs": X}, InputError, r"it must be a tuple(.|\n)*write \(x,\)"),
    ({"example_inputs": ()}, InputError, r"missing a required argument: 'input'\n  forward\(input\)"),
    ({"example_inputs": {}}, InputError, "missing a required argument: 'input'"),
    ({"example_inputs": {"inptu": X}}, InputError, r"no argument 'inptu'\n  did you mean input\?"),
    ({"example_inputs": (X, X)}, InputError, "too many positional"),
    ({"example_inputs": (X[:, :7],)}, InputError, r"the model fails on its example inputs(.|\n)*a plain call"),
    ({"example_inputs": (X.double(),)}, InputError, "must have the same dtype"),
    ({"example_inputs": (X.numpy(),)}, InputError, "not numpy"),
    ({"dynamic": {"inptu": {0: "batch"}}}, InputError, r"'inptu'(.|\n)*did you mean input\?"),
    # names
    ({"recipe": "magnitud"}, UnknownNameError, r"recipe 'magnitud'\n  did you mean magnitude"),
    ({"recipe": "mask_weight()"}, UnknownNameError, r"did you mean mask_weights"),
    ({"recipe": f"{MASK}, score=magnitud)"}, UnknownNameError, r"score 'magnitud'\n  did you mean magnitude\?"),
    ({"recipe": "nowhere.yaml"}, InputError, r"nowhere\.yaml: cannot read"),
    ({"target": "x86-avx3"}, TargetError, r"unknown target 'x86-avx3'\n  did you mean x86-avx2, .*known: cpu, native"),
    ({"target": None}, TargetError, r"not NoneType\n  known: cpu, native"),
    ({"against": ("egaer",)}, UnknownNameError, r"did you mean eager\?"),
    # selectors that match nothing
    ({"recipe": f"{MASK}, targets=('nets.0',))"}, SelectorError, "pass mask_weights: the selector 'nets.0' matches none of 2 sites"),
    ({"recipe": f"{MASK}, ignore=('head',))"}, SelectorError, "the selector 'head' matches none of 2 sites"),
    ({"recipe": f"{MASK}, targets=('re:(',))"}, SelectorError, "not a regular expression"),
    # impossible budgets
    ({"recipe": "magnitude", "budget": None}, BudgetError, r"no density was given(.|\n)*--density"),
    ({"recipe": "magnitude", "budget": sc.Budget(bytes=1)}, BudgetError, r"cannot be met: bytes 1\n  the best that this recipe reaches"),
    ({"recipe": "magnitude", "budget": sc.Budget(speedup=9999)}, BudgetError, "cannot be met: speedup 9999"),
    # structures that do not divide
    ({"recipe": f"{MASK}, structure='2:4')"}, StructureError, r"pass mask_weights, 0, 2:4: 30 inputs do not divide(.|\n)*on_misfit"),
    ({"recipe": "mask_weights(density=0.3, structure='2:4', targets=('2',))"}, StructureError, "keeps 0.5 of the weights, not 0.3"),
    # models
    ({"model": net().train()}, ModelError, r"training mode\n  call model.eval\(\)"),
    ({"model": with_(lambda m: m[2].train())}, ModelError, r"2 \(Linear\) is in training mode"),
    ({"model": with_(lambda m: m[0].weight.data[0].fill_(float("nan")))}, ModelError, "0.weight: these weights hold NaN"),
    ({"model": with_(lambda m: m[2].bias.data.fill_(float("inf")))}, ModelError, "2.bias: these weights hold NaN or infinity"),
    ({"model": with_(lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(64, dtype=torch.complex64))))}, ModelError,
     r"0.bias: this weight has dtype torch.complex64\n  supported: float32"),
    ({"model": with_(lambda m: m[0].to("meta"))}, ModelError, "0.weight: this weight is on the meta device"),
    ({"model": nn.LazyLinear(4).eval()}, ModelError, r"no shape yet\n  call the model once"),
    ({"model": None}, ModelError, "the model is NoneType"),
    ({"instruments": ["verify"]}, InputError, "an instrument is an object such as Verify"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG, ids=[f"{i}-{'-'.join(w)}" for i, (w, _, _) in enumerate(WRONG)])
def test_refused_and_nothing_touched(wrong: dict[str, Any], error: type[Exception], says: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"model": net(), "example_inputs": (X,), "recipe": "magnitude", "budget": sc.Budget(density=0.5)} | wrong
    if "density" in str(wrong.get("recipe")):
        del arguments["budget"]
    model = arguments["model"]
    given = model.state_dict().values() if isinstance(model, nn.Sequential) else ()
    before = [(t, t.clone(), t._version) for t in given if t.device.type == "cpu"]
    with pytest.raises(error, match=says) as caught:
        sc.compile(**arguments)
    assert isinstance(caught.value, sc.errors.SparsifyError)
    for tensor, values, version in before:
        assert tensor._version == version
        torch.testing.assert_close(tensor, values, rtol=0, atol=0, equal_nan=True)
    assert not list(tmp_path.iterdir())


def test_every_named_target_resolves() -> None:
    assert [resolve(name).name for name in NAMES] == ["native", "native", *NAMES[2:]]


def test_tied_weights_are_pruned_once_and_stay_tied(tmp_path: Path) -> None:
    """The compiled model is the model with one mask for both places; a weight that does not lie in order is the same as one that does."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)
            self.second.weight = self.first.weight
            self.third.weight = nn.Parameter(torch.randn(64, 32).T)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    from safetensors.torch import load_file

    model, x = Tied().eval(), torch.randn(16, 64)
    for margin in (1.0, -1000.0):  # all dense, all sparse
        compiled = sc.compile(model, (x,), recipe=f"mask_weights(density=0.5) | pack() | lower(margin={margin})")
        sc.export_dense(compiled, tmp_path / "dense.safetensors")
        dense = load_file(tmp_path / "dense.safetensors")
        reference = Tied().eval()
        reference.load_state_dict({name: dense.get(name, dense.get("first.weight")) for name in reference.state_dict()})
        assert torch.equal(reference.first.weight, reference.second.weight)
        assert float((reference.third.weight != 0).float().mean()) == 0.5
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)


# --- folders that cannot be used ----------------------------------------------------------------------------------------------------------


@contextmanager
def _small_disk(place: Path) -> Iterator[None]:
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _compiles_without_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, *says: str) -> None:
    """compile() does all its work, and its report says what is wrong with the folder."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(folder))
    monkeypatch.setattr(cache, "_warnings", {})
    build._loaded.cache_clear()
    pipeline = "mask_weights(score=weight_times_input_norm, structure='16x1', density=0.3) | pack() | lower(margin=-1000.0)"
    compiled = sc.compile(net(), (X,), recipe=pipeline, calibration=[(X,)])
    build._loaded.cache_clear()
    assert {site.format for site in compiled.report().sites} == {"bsr"}
    warnings = "\n".join(compiled.report().warnings)
    assert all(word in warnings for word in ("kernel", "calibration cache", *says)), warnings


def test_a_cache_folder_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("not a folder")
    _compiles_without_a_cache(tmp_path / "cache", monkeypatch)
    assert (tmp_path / "cache").read_text() == "not a folder"


def test_a_read_only_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _small_disk(tmp_path / "disk"):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        _compiles_without_a_cache(tmp_path / "disk" / "cache", monkeypatch, "Read-only")


def test_a_full_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _small_disk(tmp_path / "disk"):
        (tmp_path / "disk" / "cache").mkdir()
        (tmp_path / "disk" / "filler").write_bytes(b"x" * 12_288)
        _compiles_without_a_cache(tmp_path / "disk" / "cache", monkeypatch, "No space left")
        assert not [p for p in (tmp_path / "disk" / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


COMPILE = """
    import sys, torch
    torch.set_num_threads(1)
    import sparsify_compiler as sc
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval(), torch.ones(4, 32)
    print("ready", flush=True)
    sys.stdin.readline()
    pipeline = "mask_weights(structure='16x1', density=0.3) | pack() | lower(margin=-1000.0)"
    compiled = sc.compile(model, (x,), recipe=pipeline)
    compiled.save(sys.argv[1])
    print(compiled(x).double().sum().item(), sc.load(sys.argv[1])(x).double().sum().item(), compiled.report().warnings)
"""


def test_two_processes_compile_and_save_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "SPARSIFY_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", textwrap.dedent(COMPILE), str(tmp_path / "out")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0] == said[1]
    assert said[0].endswith(" []")
    assert len(set(said[0].split()[:2])) == 1, "what is loaded is what was saved"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]
