"""torch's own sparse tensors: weights in CSR, float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import Call, case_of, module


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """y = ReLU(W x + b) with x as columns, W a CSR tensor."""
    torch.set_num_threads(threads)
    if not case_of(folder).is_chain:
        yield "torch fp32 CSR", "only chains of linear layers"
        return
    warnings.filterwarnings("ignore", message="Sparse CSR")
    model, x = module(folder, torch.float32)
    layers = [(layer.weight.detach().to_sparse_csr(), layer.bias.detach()[:, None]) for layer in model.children() if isinstance(layer, nn.Linear)]

    def run(columns: Tensor) -> Tensor:
        for weight, bias in layers:
            columns = torch.addmm(bias, weight, columns).relu_()
        return columns

    turned = x.T.contiguous()
    yield "torch fp32 CSR", "fp32", Call(lambda columns: run(columns).T, turned)
