"""Images without a batch dimension go through libraries as batches of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.epilogue import META, epilogue_of, epilogues
from sparsify_compiler.export_library_single import with_batch
from sparsify_compiler.target import host
from sparsify_compiler.whole_call import build_call

SPARSE = "mask_weights(structure='1x1', density=0.5) | pack() | lower(margin=-1000.0, rounds=1)"
MODELS = {"convolutions": (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1),
                                         nn.AdaptiveAvgPool2d(1)), (3, 9, 9)),
          "sound": (nn.Sequential(nn.Conv1d(3, 8, 3, padding="same"), nn.AvgPool1d(2), nn.ConvTranspose1d(8, 2, 3)), (3, 12)),
          "a pool alone": (nn.MaxPool2d(2), (3, 8, 8))}


@pytest.mark.parametrize("name", MODELS)
def test_a_single_image(name: str) -> None:
    torch.manual_seed(0)
    model, shape = MODELS[name]
    x = torch.randn(shape)
    compiled = sc.compile(model.eval(), (x,), recipe=sc.Pipeline.parse(SPARSE), target="cpu", calls="parts")
    library, _ = build_call(compiled.program, host(), {})
    with torch.no_grad():
        torch.testing.assert_close(library.run(x)[0], compiled(x), rtol=1e-4, atol=1e-5)


def test_what_a_kernel_computed_behind_a_convolution_follows_the_view() -> None:
    region = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), (torch.randn(3, 9, 9),)).regions[""]
    node = next(node for node in region.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    node.meta[META] = epilogues(node)[-1].names[0]
    with_batch(node)
    assert epilogue_of(node).names == ()
