"""The authors' own code of SparseGPT, Wanda and DSnoT against ours: SmolLM2, the same weights, the same calibration tokens, the same measure.

    git clone https://github.com/IST-DASLab/sparsegpt FOLDER        # locuslab/wanda for wanda, zyxxmu/DSnoT for dsnot and "dsnot everywhere"
    python benchmarks/prune_authors.py --method wanda --authors FOLDER --brown FOLDER [--structures 50% 2:4] [--orders 3] [--json FILE]
    python benchmarks/prune_authors.py --method "dsnot, one variance" --first --authors FOLDER --brown FOLDER     # the first block alone, in seconds

Rounding decides which of two nearly equal weights goes, and what goes first changes what the layers behind it see. So each code also runs with the
calibration texts in other orders, which changes nothing but rounding: how far the perplexities of one code lie apart is what a difference between
the two codes has to be held against. Masks and values of the first block, whose inputs are the same in both, are compared one by one, and the masks
of all blocks.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from prune_quality import METHODS, STRUCTURES, tell
from subjects import LENGTH, SmolLM2, options
from torch import Tensor, nn

from sparsify_compiler import recipes
from sparsify_compiler.call import instantiate
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, get_tensor


@dataclass(frozen=True)
class Side:
    """One method: our pipeline, and the authors' code on a copy of the model."""

    ours: Callable[[str, float], Pipeline]
    authors: Callable[[nn.Module, list[Tensor], str, float], nn.Module]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--authors", type=Path, required=True)
    parser.add_argument("--method", choices=list(SIDES), default="sparsegpt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--structures", nargs="+", choices=["30%", "50%", "60%", "2:4", "4:8"], default=["50%"])
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--first", action="store_true", help="of a model of one block compare the masks, and measure nothing")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.authors))
    torch.set_grad_enabled(False)
    subject = SmolLM2(arguments)
    if arguments.first:
        subject.texts = {}
        del subject.model.model.layers[1:]
        subject.capture()
    batches = list(subject.batches)
    side = SIDES[arguments.method]
    rows: list[dict[str, Any]] = []
    for structure in arguments.structures:
        kept: dict[str, Tensor] = {}    # by the authors' code in the first order
        for order in range(arguments.orders):
            subject.batches = batches[order:] + batches[:order]
            pruned = subject.prune(side.ours(*STRUCTURES[structure]))
            start = time.perf_counter()
            theirs = side.authors(subject.model, [batch["input_ids"] for batch in subject.batches], *STRUCTURES[structure])
            seconds = time.perf_counter() - start
            about = {"method": arguments.method, "structure": structure, "order": order}
            rows.append({"code": "ours", **about, **subject.measure(instantiate(pruned)), **compare(pruned, theirs)})
            found = {name: weight != 0 for name, weight in weights_of(theirs)}
            kept = kept or found
            rows.append({"code": "authors", **about, "seconds": seconds, **subject.measure(theirs), "other bits than in order 0": apart(found, kept)})
            for row in rows[-2:]:
                tell(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))


def pattern(structure: str) -> tuple[int, int]:
    """(n, m) of n:m, (0, 0) of unstructured weights."""
    n, m = map(int, structure.split(":")) if ":" in structure else (0, 0)
    return n, m


def sparsegpt(model: nn.Module, texts: list[Tensor], structure: str, density: float) -> nn.Module:
    """A copy of the model pruned by the authors' class, layer by layer in the order of their llama.py."""
    SparseGPT = import_module("sparsegpt").SparseGPT
    torch.cuda.synchronize = lambda *given: None  # their code waits for a GPU
    n, m = pattern(structure)
    pruned: Any = copy.deepcopy(model)
    states = [(pruned.model.embed_tokens(text), torch.arange(text.shape[1])[None]) for text in texts]
    for block in pruned.model.layers:
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        cutters = {name: SparseGPT(layer) for name, layer in layers.items()}
        hooks = [layer.register_forward_hook(lambda _, given, out, cutter=cutters[name]: cutter.add_batch(given[0], out))
                 for name, layer in layers.items()]
        through(pruned, block, states)
        for hook in hooks:
            hook.remove()
        for cutter in cutters.values():
            cutter.fasterprune(1 - density, prunen=m - n, prunem=m, percdamp=0.01, blocksize=128)
            cutter.free()
        states = through(pruned, block, states)
    return pruned


def through(model: Any, block: nn.Module, states: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The residual stream behind a block."""
    found = []
    for x, positions in states:
        out = block(x, attention_mask=None, position_ids=positions, position_embeddings=model.model.rotary_emb(x, positions))
        found.append((out[0] if isinstance(out, tuple) else out, positions))
    return found


def whole(function: str, one_variance: bool = False, **options: Any) -> Callable[[nn.Module, list[Tensor], str, float], nn.Module]:
    """A function `function(args, model, tokenizer, device, n, m)` of the clone's lib/prune.py on a copy of the model.

    one_variance    DSnoT's inputs vary about their mean over all texts; in the authors' code about that of each text, and the mean of it is taken
    """

    def run(model: nn.Module, texts: list[Tensor], structure: str, density: float) -> nn.Module:
        sys.modules.setdefault("datasets", ModuleType("datasets")).load_dataset = None  # type: ignore[attr-defined]  # imported there, not needed here
        prune = import_module("lib.prune")
        prune.get_loaders = lambda *given, **named: ([(text,) for text in texts], None)  # type: ignore[attr-defined]
        if one_variance:
            prune.WrappedGPT = with_one_variance(import_module("lib.layerwrapper").WrappedGPT)  # type: ignore[attr-defined]
        n, m = pattern(structure)
        pruned: Any = copy.deepcopy(model)
        pruned.hf_device_map, pruned.seqlen = {}, LENGTH
        hooks = [block.register_forward_pre_hook(with_positions(pruned), with_kwargs=True) for block in pruned.model.layers]
        arguments = SimpleNamespace(nsamples=len(texts), seed=0, sparsity_ratio=1 - density, use_variant=False, get_time_overhead=False, **options)
        getattr(prune, function)(arguments, pruned, None, torch.device("cpu"), m - n, m)
        for hook in hooks:
            hook.remove()
        return pruned

    return run


def with_one_variance(wrapped: Any) -> Any:
    """The authors' statistics of a layer's inputs, but for the variance."""

    class OneVariance(wrapped):  # type: ignore[misc]
        def add_batch(self, x: Tensor, y: Tensor) -> None:
            super().add_batch(x, y)
            rows = x.reshape(-1, x.shape[-1]).double()
            self.sums = getattr(self, "sums", 0) + torch.stack([rows.sum(0), rows.square().sum(0)])
            mean, square = self.sums / self.ntokens
            self.var = (square - mean.square()).float()[:, None]

    return OneVariance


def with_positions(model: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The authors wrote for a transformers whose blocks made their position embeddings themselves."""

    def add(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = torch.arange(given[0].shape[1])[None]
        return given, {**named, "position_embeddings": model.model.rotary_emb(given[0], positions)}

    return add


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of each linear layer of the blocks."""
    return ((name, layer.weight) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith("model.layers."))


def apart(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Share of the bits that differ."""
    return sum(int((mask != others[name]).sum()) for name, mask in some.items()) / sum(mask.numel() for mask in some.values())


def compare(ours: Program, theirs: nn.Module, block: str = "model.layers.0.") -> dict[str, float]:
    """Share of mask bits that differ, of all blocks and of the first; and the largest difference of values of the first that both kept, relative."""
    module, both = ours.regions[""].module, dict(weights_of(theirs))
    mine = {name: get_tensor(module, f"{name}.weight") * get_tensor(module, f"{name}.weight_mask") for name in both}
    masks = [{name: weight != 0 for name, weight in one.items()} for one in (mine, both)]
    first = [name for name in both if name.startswith(block)]
    worst = max(float((mine[name] - both[name])[masks[0][name] & masks[1][name]].abs().max() / both[name].abs().max()) for name in first)
    return {"other bits": apart(*masks), "other bits in the first block": apart(*({name: one[name] for name in first} for one in masks)),
            "largest difference there": worst}


DSNOT = {"initial_method": "wanda", "max_cycle_time": 50, "update_threshold": 0.1, "pow_of_var_regrowing": 1, "without_same_sign": True,
         "skip_sub_layer": "no_skip", "without_DSnoT": False}  # the defaults of their main.py, and `--initial_method wanda` of their README
# Their threshold is of an output's error summed over a text, ours of its mean.
OURS = f"dsnot(threshold={DSNOT['update_threshold'] / LENGTH})"


def dsnot(structure: str, density: float, targets: tuple[str, ...] = ("linear",)) -> Pipeline:
    """Ours, with the threshold for texts of this length."""
    whole_rows = "row" if structure == "unstructured" else structure
    return Pipeline((MaskWeights("weight_times_input_norm", whole_rows, density=density, targets=targets, repair=OURS, inputs="block"),))


def in_attention(structure: str, density: float) -> Pipeline:
    """DSnoT in attention, Wanda in the FFNs."""
    return dsnot(structure, density, ("attention",)) | METHODS["wanda"](structure, density)


SIDES = {"sparsegpt": Side(recipes.sparsegpt, sparsegpt),
         "wanda": Side(METHODS["wanda"], whole("prune_wanda")),
         "dsnot": Side(in_attention, whole("prune_DSnoT", skip_layer="mlp", **DSNOT)),   # as their main.py does it unless told otherwise
         "dsnot everywhere": Side(dsnot, whole("prune_DSnoT", skip_layer="no_skip", **DSNOT)),
         "dsnot, one variance": Side(dsnot, whole("prune_DSnoT", one_variance=True, skip_layer="no_skip", **DSNOT))}


if __name__ == "__main__":
    main()
