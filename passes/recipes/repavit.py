"""RePaViT."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.reparam.fold_scale import FoldScale
from sparsify_compiler.passes.reparam.idle_channels import IdleChannels
from sparsify_compiler.passes.reparam.merge_idle_channels import MergeIdleChannels
from sparsify_compiler.pipeline import Pipeline


def repavit(theta: float = 0.75, which: Literal["last", "first", "straightest"] = "last", norm: Literal["keep", "batch"] = "keep",
            targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Let a share of each FFN's hidden channels bypass the activation, and merge them into one linear beside a thin FFN.

    The paper trains in between: run the first pass, `repavit()[:1]`, train what `call.instantiate` gives, then run or compile with
    `repavit()[1:]`. A model whose FFNs were trained with idle channels needs only the latter. Without training take which="straightest".

    Paper      RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers, Xu et al.,
               arXiv:2505.21847
    """
    return Pipeline((IdleChannels(theta, which, norm, targets, ignore), FoldScale(), MergeIdleChannels()))
