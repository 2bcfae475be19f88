"""How much of a mixture of experts that stays on disk comes into memory: load(mapped=True), then one token after the other.

    python benchmarks/experts_disk.py --folder FOLDER --build       # a Mixtral of random weights, compiled and saved
    python benchmarks/experts_disk.py --folder FOLDER               # in a process of its own: MB of the weights' file that this process has read
    python benchmarks/experts_disk.py --folder FOLDER --experts 48  # the same with 48 MB of experts in memory at most

Linux only: what is resident is what /proc/self/smaps says of the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

import sparsify_compiler as sc

CONFIG = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
          "num_local_experts": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--experts", type=int, help="MB of experts that may be in memory")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    place = arguments.folder / "mixture"
    if arguments.build:
        model = MixtralForCausalLM(MixtralConfig(**CONFIG)).eval()
        prompt = {"input_ids": torch.randint(1, 256, (1, 8))}
        sc.compile(model, prompt, recipe=sc.Pipeline.parse("lower()"), dynamic={"input_ids": {0: "batch", 1: "tokens"}}).save(place)
        return
    with torch.device("meta"):  # its classes are needed, not its weights
        model = MixtralForCausalLM(MixtralConfig(**CONFIG)).eval()
    loaded = sc.load(place, model=model, mapped=True, experts_bytes=None if arguments.experts is None else arguments.experts << 20)
    console = Console()
    console.print("loaded: {1} of {0} MB in memory".format(*resident(place)))
    for tokens in arguments.tokens:
        loaded.generate(torch.randint(1, 256, (1, 1)), max_new_tokens=tokens, do_sample=False)
        known = loaded.resident_experts
        more = "" if known is None else (f", {known.bytes >> 20} MB of them experts; {known.reads['from disk']} read, "
                                         f"{known.reads['in memory']} still there")
        console.print(f"after {tokens} more tokens: {resident(place)[1]} MB{more}")


def resident(folder: Path) -> tuple[int, int]:
    """MB of the file of weights that are mapped, and of those that were read."""
    found, ours = {"Size:": 0, "Rss:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            ours = str(folder.resolve()) in line
        elif ours and first in found:
            found[first] += int(rest[0])
    return found["Size:"] >> 10, found["Rss:"] >> 10


if __name__ == "__main__":
    main()
