"""Exact reparameterisation."""

from __future__ import annotations

from sparsify_compiler.passes.reparam.collapse import Collapse
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes.reparam.fold_scale import FoldScale
from sparsify_compiler.passes.reparam.merge_adapters import MergeAdapters
from sparsify_compiler.passes.reparam.merge_idle_channels import MergeIdleChannels
from sparsify_compiler.passes.reparam.merge_structured_ffn import MergeStructuredFfn
from sparsify_compiler.pipeline import Pipeline


def reparam() -> Pipeline:
    """Every exact merge that pays: adapters, structured and channel-idle FFNs, and any region of linear, shift-invariant ops.

    Paper      none: RepVGG (arXiv:2101.03697), FastViT (arXiv:2303.14189), RePaViT (arXiv:2505.21847) and what else passes/reparam cites
    """
    return Pipeline((MergeAdapters(), MergeStructuredFfn(), MergeIdleChannels(), Collapse(), FoldBatchnorm(), FoldScale()))
