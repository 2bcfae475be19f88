"""What the kernels of FFNs that read some of their neurons share: which weights they take, and how these lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen.bound import BoundLayer
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.gather import ROUND, in_order
from sparsify_compiler.codegen.kernels.gather_rows import LANES
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target

WEIGHTS = ("gate", "up", "down")


def takes(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Are these weights of this dtype and of whole vectors, and the activation known?"""
    weights = [tensors[name] for name in WEIGHTS if name in tensors]
    if dtype not in DTYPES or any(weight.dtype is not dtype for weight in weights):
        return False
    hidden, inputs = tensors["gate"].shape
    step = LANES * (2 if dtype is torch.bfloat16 else 1)
    fits = hidden % LANES == 0 and inputs % step == 0 and min(hidden, inputs, tensors["down"].shape[1]) > 0
    return fits and attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS


def are_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Are these gate and up [H, K] and down [H, N]; or gate alone, without up?"""
    gate, down = tensors["gate"], tensors["down"]
    return gate.dim() == down.dim() == 2 and tensors.get("up", gate).shape == gate.shape and down.shape[0] == gate.shape[0]


class GatheredFfn(BoundLayer):
    """An FFN bound to its weights gate and up [H, K], down [H, N]; down is held in rows of whole cache lines, `width` numbers each."""

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
                 target: Target) -> None:
        self.options, self.target, self._activation = dict(options), target, str(attributes["activation"])
        self._tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        self._bias = None if bias is None else bias.detach()
        self._dtype, self.in_features, self.out_features = tensors["gate"].dtype, tensors["gate"].shape[1], tensors["down"].shape[1]
        self.width = -(-self.out_features // ROUND) * ROUND
        down = self._tensors["down"]
        self._tensors["down"] = resident(down if self.width == self.out_features else pad(down, (0, self.width - self.out_features)))
        self._down = self._tensors["down"][:, : self.out_features].t()

    def _fixed(self) -> list[Tensor]:
        """gate, up, their biases, down and its bias, as the kernels take them; without up there is no number behind it."""
        given, hidden = self._tensors, self._tensors["gate"].shape[0]
        words = {name: given[name] if self._dtype is torch.float32 else given[name].view(torch.int32) for name in WEIGHTS if name in given}
        biases = [given[name].float() if name in given else torch.zeros(hidden, dtype=torch.float32) for name in ("gate_bias", "up_bias")]
        total = in_order(padded_bias(self._bias, self.out_features, self.width), self._dtype)
        return [words["gate"], words.get("up", words["gate"][:1]), *biases, words["down"], total]

    def state(self) -> dict[str, Tensor]:
        return {**self._tensors, **({} if self._bias is None else {"bias": self._bias})}
