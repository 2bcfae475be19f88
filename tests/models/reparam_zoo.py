"""The networks on which exact reparameterisation is proved and measured, by name: how each is made, on what it runs, what rivals it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models import acnet_dbb, convnext_vit, fastvit, fusing, mobileone, pretrained, replknet, repvgg


@dataclass(frozen=True)
class Network:
    """make        the network as it is trained, fresh; or with its real weights
    image       one input as measured: channels, rows, columns
    small       one input as tested
    by_hand     a copy, reparameterised as a careful user would: by the paper's formulas, and whatever folds beside them
    trained     has real weights: they are not to be randomised
    twin        the network of the same size without the structure that is merged away: what its paper compares with
    """

    make: Callable[[], nn.Module]
    image: tuple[int, int, int] = (3, 224, 224)
    small: tuple[int, int, int] = (3, 64, 64)
    by_hand: Callable[[nn.Module], nn.Module] = fusing.reparameterised_by_hand
    trained: bool = False
    twin: Callable[[], nn.Module] | None = None

    def lived_in(self, batch: int = 2, image: tuple[int, int, int] | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        """The network in eval mode as after training, and a batch of images. Raises NotInstalledError where its weights are absent."""
        images = fusing.images(max(batch, 8), *(image or self.image), dtype=torch.float32)
        torch.manual_seed(0)
        model = self.make()
        if not self.trained:
            fusing.randomise(model, images[:8])
        return model.to(dtype).eval(), images[:batch].to(dtype)


def _copied(by_hand: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: by_hand(copy.deepcopy(model)).eval()


_tiny = partial(Network, small=(3, 32, 32), image=(3, 32, 32))

# Whole networks, each with a hand-written rival.
NETWORKS: dict[str, Network] = {
    "repvgg_a0": Network(repvgg.repvgg_a0),
    "mobileone_s0": Network(mobileone.mobileone_s0),
    "fastvit_t8": Network(fastvit.fastvit_t8),
    "replknet_small": Network(replknet.replknet_small),
    "acnet": Network(acnet_dbb.acnet),
    "dbb": Network(acnet_dbb.dbb),
    "convnext_atto": Network(convnext_vit.convnext_atto),
    "repa_vit_small": Network(convnext_vit.repa_vit_small, small=(3, 224, 224), twin=convnext_vit.vit_small),
    "repa_vit_large": Network(convnext_vit.repa_vit_large, small=(3, 224, 224), twin=convnext_vit.vit_large),
    "efficientnet_lite0": Network(pretrained.efficientnet_lite0, small=(3, 96, 96), trained=True,
                                  by_hand=_copied(pretrained.efficientnet_by_hand)),
    "english_g2": Network(pretrained.english_g2, image=(1, 64, 200), small=(1, 64, 100), trained=True,
                          by_hand=_copied(pretrained.recogniser_by_hand)),
}

# The same structures in little, and forms that no published network needs.
SMALL: dict[str, Network] = {
    "acnet_tiny": _tiny(acnet_dbb.acnet_tiny),
    "dbb_tiny": _tiny(acnet_dbb.dbb_tiny),
    "repvgg_tiny": _tiny(repvgg.repvgg_tiny),
    "mobileone_tiny": _tiny(mobileone.mobileone_tiny),
    "fastvit_tiny": _tiny(fastvit.fastvit_tiny),
    "replknet_tiny": _tiny(replknet.replknet_tiny),
    "convnext_tiny": _tiny(convnext_vit.convnext_tiny),
    "repa_vit_tiny": _tiny(convnext_vit.repa_vit_tiny, twin=convnext_vit.vit_tiny),
    "repa_vit_split": _tiny(partial(convnext_vit.repa_vit_tiny, spelling="split")),
    "repa_vit_layer_norm": _tiny(partial(convnext_vit.repa_vit_tiny, norm="layer", spelling="split")),
}

EVERY = {**NETWORKS, **SMALL}
