"""The command line: every verb works on a small model, teaches with --help, and ends in one short message when it is used wrongly."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_compiler import catalog
from sparsify_compiler.cli import app, main
from sparsify_compiler.cli_options import parse_dynamic, parse_sizes
from sparsify_compiler.errors import InputError, SparsifyError

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    return model, (torch.randn(16, 64),), [(torch.randn(16, 64),) for _ in range(2)]

def parts():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)
        def forward(self, x):
            return self.inner(x) if bool((x > 0).any()) else x
    return Odd().eval(), {"x": torch.randn(2, 16)}

def wrong():
    return 1

def fails():
    raise OSError("no weights here")

def other():
    return nn.Conv2d(3, 4, 1).eval(), (torch.randn(1, 3, 4, 4),)

number = 3
"""
VERBS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("import nothing_like_it")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `sparsify compile` wrote, with both reports."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "my_model.py").write_text(MODEL)
    status = main(
        [
            "compile",
            f"{folder}/my_model.py:make",
            "--recipe",
            "mask_weights(structure='16x1')",
            "--density",
            "0.2",
            "--dynamic",
            "input.0=batch",
            "--out",
            f"{folder}/out",
            "--html",
            f"{folder}/r.html",
            "--json",
            f"{folder}/r.json",
            "--quiet",
        ]
    )
    assert status == 0
    return folder


def test_there_are_the_promised_verbs() -> None:
    there = ["compile", "report", "show", "why", "passes", "recipes", "targets", "estimate", "bench", "explain", "tune", "export"]
    assert sorted(VERBS) == sorted(there)


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"sparsify {verb}" in text.split("Example")[1]


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_compile_saves_and_reports(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (compiled / "out" / "manifest.json").is_file()
    assert "<html" in (compiled / "r.html").read_text(encoding="utf-8")
    assert len(json.loads((compiled / "r.json").read_text(encoding="utf-8"))["sites"]) == 2
    assert main(["report", f"{compiled}/out", "--json", "again.json"]) == 0
    assert "density 0.2" in capsys.readouterr().out
    assert json.loads(Path("again.json").read_text(encoding="utf-8"))["budget"] == "density 0.2"
    assert main(["report", f"{compiled}/r.json"]) == 0


def test_explain_tells_the_story_of_a_site(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "0", f"{compiled}/out"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("0: linear with a weight of ")
    assert told[1].split()[0] == "dense"
    assert "16x1, 20 % kept" in " ".join(told)
    assert main(["explain", "1.0", f"{compiled}/out"]) == 2
    assert "did you mean 0" in capsys.readouterr().err


def test_reports_are_tables_too(compiled: Path) -> None:
    assert main(["report", f"{compiled}/out", "--csv", "sites.csv"]) == 0
    assert [row["site"] for row in csv.DictReader(io.StringIO(Path("sites.csv").read_text(encoding="utf-8")))] == ["0", "2"]


def test_bench_compares_with_dense(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"{compiled}/out", "--size", "batch=4", "--rounds", "3"]) == 0
    assert "same graph, dense weights" in capsys.readouterr().out
    assert main(["bench", f"{compiled}/out", "my_model.py:make", "--rounds", "3"]) == 0
    assert "original model" in capsys.readouterr().out
    assert main(["bench", f"{compiled}/out", "my_model.py:other", "--rounds", "3"]) == 2
    assert "do not fit the saved model" in capsys.readouterr().err


def test_a_model_captured_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "my_model.py:parts", "--recipe", "magnitude", "--density", "0.5", "--out", "parts", "--quiet"]) == 0
    assert main(["bench", "parts", "--rounds", "3"]) == 2
    assert main(["bench", "parts", "my_model.py:parts", "--rounds", "3"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(("verb", "kind"), [("passes", "pass"), ("recipes", "recipe")])
def test_lists(verb: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in catalog.names(kind))


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    assert "native" in capsys.readouterr().out


def test_show_has_description_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "fold_batchnorm"]) == 0
    description, before, after = capsys.readouterr().out.replace("\nafter ", "\nbefore\n").split("\nbefore\n")
    assert "Paper" in description
    assert "batch_norm" in before
    assert "batch_norm.default" not in after
    assert main(["show", "wanda", "my_model.py:make"]) == 0
    assert "weight_mask" in capsys.readouterr().out


def test_why_names_the_miss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "fold_batchnorm", "my_model.py:make"]) == 0
    assert "batch_norm" in capsys.readouterr().out


WRONG = [
    (["compile", "my_model.py:mak", "--density", "0.5"], "did you mean make?"),
    (["compile", "my_model.py:number"], "has no function"),
    (["compile", "my_model.py:wrong"], "returned int"),
    (["compile", "missing.py:make"], "no file missing.py"),
    (["compile", "missing_module:make"], "no module"),
    (["compile", "missing_package.models:make"], "no module"),
    (["compile", "nonsense"], "not a model"),
    (["compile", "hf:nowhere"], "config.json"),
    (["compile", "my_model.py:make", "--recipe", "wandda", "--density", "0.5"], "did you mean wanda"),
    (["compile", "my_model.py:make", "--target", "cpuu", "--density", "0.5"], "unknown target"),
    (["compile", "my_model.py:make", "--density", "0.5", "--speedup", "2"], "at once"),
    (["compile", "my_model.py:make", "--density", "1.5"], "density is 1.5"),
    (["compile", "my_model.py:make", "--dynamic", "x"], "cannot read 'x'"),
    (["compile", "my_model.py:make", "--dynamic", "nope.0=batch", "--density", "0.5"], "nope"),
    (["compile", "my_model.py:fails"], "my_model.py:fails: the function raised OSError: no weights here"),
    (["compile", "broken.py:make"], "broken.py could not be run: ModuleNotFoundError: No module named 'nothing_like_it'"),
    (["compile", "my_model.py:make", "--density", "0.5", "--out", "."], "something else is there"),
    (["compile", "my_model.py:make", "--density", "0.5", "--html", "no/such/r.html"], "no such folder"),
    (["compile", "my_model.py:make", "--recipe", "mask_weights(targets='0')"], "write ('0',)"),
    (["compile", "my_model.py:make", "--recipe", "magnitude", "--quiet"], "--density 0.5"),
    (["report", "."], "not an artefact"),
    (["report", "my_model.py"], "my_model.py: not a report"),
    (["report", "nowhere", "--json", "."], "this is a folder"),
    (["show", "my_model.py:make"], "first the pass, then the model"),
    (["report", "nowhere"], "cannot be read"),
    (["report", "nowhere", "--csv", "."], "this is a folder"),
    (["explain", "0", "nowhere"], "cannot be read"),
    (["bench", "nowhere"], "no such folder"),
    (["show", "fold_batchnor"], "did you mean fold_batchnorm"),
    (["why", "nope", "my_model.py:make"], "unknown"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_use_ends_in_a_short_message(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 4
    with pytest.raises(SparsifyError):
        main([*arguments, "--traceback"])


@pytest.mark.parametrize(
    "arguments", [["nope"], ["compile"], ["compile", "m", "--nope"], ["compile", "m", "--density", "x"], ["bench", "d", "--rounds", "0"]]
)
def test_wrong_options_end_in_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "sparsify" in capsys.readouterr().err


def test_options_are_read() -> None:
    assert parse_dynamic(["input_ids.0=batch", "input_ids.1=seq", "mask.0=batch"]) == {"input_ids": {0: "batch", 1: "seq"}, "mask": {0: "batch"}}
    assert parse_dynamic([]) is None
    assert parse_sizes(["batch=8"]) == {"batch": 8}
    for wrong in ("batch", "batch=", "=3", "batch=0", "batch=-1"):
        with pytest.raises(InputError):
            parse_sizes([wrong])


def test_without_calibration_a_note_says_what_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "my_model.py:other", "--recipe", "magnitude", "--density", "0.5"]) == 0
    assert "note: my_model.py:other gives no calibration batches" in capsys.readouterr().err


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "sparsify_compiler", "show", ""], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PASS_OR_PIPELINE: the pipeline is empty")


def test_it_runs_as_a_program() -> None:
    """A fresh process; nothing heavy is imported for --help beyond the package itself."""
    code = (
        "import sys; from sparsify_compiler.cli import main; status = main(['--help']); "
        "print(status, [m for m in ('tvm', 'transformers', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
