"""SparseGPT's own code against ours: SmolLM2, the same weights, the same calibration tokens, the same measure.

    git clone https://github.com/IST-DASLab/sparsegpt FOLDER
    python benchmarks/prune_authors.py --authors FOLDER --brown FOLDER [--structures 50% 2:4] [--orders 3] [--json FILE]

Rounding decides which of two nearly equal weights goes, and what goes first changes what the layers behind it see. So each code also runs with the
calibration texts in other orders, which changes nothing but rounding: how far the perplexities of one code lie apart is what a difference between
the two codes has to be held against. The masks and values of the first block, whose inputs are the same in both, are compared one by one.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prune_quality import STRUCTURES, tell
from subjects import SmolLM2, options
from torch import Tensor, nn

from sparsify_compiler import recipes
from sparsify_compiler.call import instantiate
from sparsify_compiler.program import Program, get_tensor


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--authors", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--structures", nargs="+", choices=["30%", "50%", "60%", "2:4", "4:8"], default=["50%"])
    parser.add_argument("--orders", type=int, default=1)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.authors))
    torch.set_grad_enabled(False)
    subject = SmolLM2(arguments)
    batches = list(subject.batches)
    rows: list[dict[str, Any]] = []
    for structure in arguments.structures:
        for order in range(arguments.orders):
            subject.batches = batches[order:] + batches[:order]
            pruned = subject.prune(recipes.sparsegpt(*STRUCTURES[structure]))
            start = time.perf_counter()
            theirs = by_authors(subject.model, [batch["input_ids"] for batch in subject.batches], *STRUCTURES[structure])
            seconds = time.perf_counter() - start
            about = {"structure": structure, "order": order}
            rows.append({"code": "ours", **about, **subject.measure(instantiate(pruned)), **compare(pruned, theirs)})
            rows.append({"code": "authors", **about, "seconds": seconds, **subject.measure(theirs)})
            for row in rows[-2:]:
                tell(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))


def by_authors(model: nn.Module, texts: list[Tensor], structure: str, density: float) -> nn.Module:
    """A copy of the model pruned by the authors' class, layer by layer in the order of their llama.py."""
    from sparsegpt import SparseGPT  # type: ignore[import-not-found]

    torch.cuda.synchronize = lambda *given: None  # their code waits for a GPU
    n, m = map(int, structure.split(":")) if ":" in structure else (0, 0)
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


def compare(ours: Program, theirs: nn.Module, block: str = "model.layers.0.") -> dict[str, float]:
    """Share of mask bits of the first block that differ, and the largest difference of values that both kept, relative to the largest value."""
    module, bits, total, worst = ours.regions[""].module, 0, 0, 0.0
    for name, layer in theirs.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith(block):
            mine = get_tensor(module, f"{name}.weight") * get_tensor(module, f"{name}.weight_mask")
            both = (mine != 0) & (layer.weight != 0)
            bits, total = bits + int(((mine != 0) != (layer.weight != 0)).sum()), total + mine.numel()
            worst = max(worst, float((mine - layer.weight)[both].abs().max() / layer.weight.abs().max()))
    return {"other bits in the first block": bits / total, "largest difference there": worst}


if __name__ == "__main__":
    main()
