"""A mixture of experts by our kernel, beside transformers' own forms, an expert after the other, and a dense FFN of the same FLOPs.

    python benchmarks/experts.py --build                                             # build the kernels ahead of the measurement
    python benchmarks/experts.py --experts 8 --width 1024 --dtype fp32 --tokens 1 16 256 1024

Mixtral's experts, --hidden neurons each, top 2, random weights. transformers' forms are those of its own MixtralExperts: grouped_mm (which is
torch's grouped product), batched_mm up to 16 tokens, eager. Every call of every form takes the next of many random choices of experts, so that no
form finds in a cache what another one read. "dense" is a gated FFN of top 2's FLOPs; "read" is torch.sum over as many bytes as the chosen experts
have, anywhere in all weights. Milliseconds, medians over interleaved rounds; "gain" is the fastest rival's over ours: median and quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from sparsify_compiler.codegen import runtime
from sparsify_compiler.target import host

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOP, CHOICES, BATCHED = 2, 61, 16
Form = Callable[[Tensor, Tensor, Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.build:
        for dtype in DTYPES.values():
            ours(experts_of(2, 64, 64, dtype))
        return
    mixture = experts_of(arguments.experts, arguments.width, arguments.hidden, DTYPES[arguments.dtype])
    table = Table(title=f"{arguments.experts} experts, width {arguments.width}, {arguments.hidden} neurons, top {TOP}, {arguments.dtype}")
    for tokens in arguments.tokens:
        measured = times(forms(mixture, tokens), mixture, tokens, arguments.seconds / len(arguments.tokens))
        if not table.columns:
            for name in ("tokens", *COLUMNS, "gain", "of the dense rate", "of the read rate"):
                table.add_column(name, justify="right")
        table.add_row(str(tokens), *[f"{statistics.median(measured[name]):.3f}" if name in measured else "-" for name in COLUMNS], *ratios(measured))
    Console(width=170).print(table)


COLUMNS = ("ours", "grouped_mm", "batched_mm", "eager", "one by one", "dense", "read")
RIVALS = ("grouped_mm", "batched_mm", "eager", "one by one")


def ratios(measured: Mapping[str, list[float]]) -> list[str]:
    """Ours as a ratio to the fastest rival, to the dense FFN and to reading: medians, and for the rival the quartiles."""
    rival = min((name for name in RIVALS if name in measured), key=lambda name: statistics.median(measured[name]))
    gains = sorted(a / b for a, b in zip(measured[rival], measured["ours"], strict=True))
    quarter = len(gains) // 4
    rest = [statistics.median(a / b for a, b in zip(measured[name], measured["ours"], strict=True)) for name in ("dense", "read")]
    return [f"{statistics.median(gains):.2f} ({gains[quarter]:.2f}-{gains[-1 - quarter]:.2f})", *[f"{value:.2f}" for value in rest]]


def experts_of(experts: int, width: int, hidden: int, dtype: torch.dtype) -> Any:
    """transformers' module with random weights."""
    config = MixtralConfig(num_local_experts=experts, hidden_size=width, intermediate_size=hidden)
    mixture: Any = MixtralExperts(config).to(dtype)
    for parameter in mixture.parameters():
        parameter.copy_(torch.randn(parameter.shape[1:], dtype=torch.float32) / parameter.shape[-1] ** 0.5)  # one expert's, for all
    return mixture.eval()


def ours(mixture: Any) -> Any:
    """Our kernel on the module's own weights."""
    half = mixture.gate_up_proj.shape[1] // 2
    tensors = {"gate": mixture.gate_up_proj[:, :half], "up": mixture.gate_up_proj[:, half:], "down": mixture.down_proj}
    found = runtime.candidates("experts_ffn", tensors, {"activation": "silu"}, mixture.down_proj.dtype, (1,), host())
    kernels = [candidate for candidate in found if candidate.options["family"] == "experts_ffn"]  # torch's grouped product is a candidate, too
    if not kernels:
        raise SystemExit(f"this machine has no kernel for experts of {mixture.down_proj.dtype}: AVX-512 is needed, for bfloat16 AVX512_BF16")
    return kernels[0].bind()


def forms(mixture: Any, tokens: int) -> dict[str, Form]:
    """Each takes x [tokens, width], the chosen experts and their weights."""
    made: dict[str, Form] = {"ours": ours(mixture)}
    for name in ("grouped_mm", "batched_mm", "eager"):
        if name != "batched_mm" or tokens <= BATCHED:
            made[name] = _transformers(mixture, name)
    made["one by one"] = _one_by_one(mixture)
    width, hidden = mixture.down_proj.shape[1:]
    dtype = mixture.down_proj.dtype
    both, down = (torch.randn(size, dtype=torch.float32).to(dtype) for size in ((2 * TOP * hidden, width), (width, TOP * hidden)))
    made["dense"] = lambda x, chosen, weights: linear(_gated(linear(x, both)), down)
    return made | {"read": _read(mixture, tokens)}


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return silu(gate) * up


def _transformers(mixture: Any, name: str) -> Form:
    def run(x: Tensor, chosen: Tensor, weights: Tensor) -> object:
        mixture.config._experts_implementation_internal = name
        return mixture(x, chosen, weights)

    return run


def _one_by_one(mixture: Any) -> Form:
    """The loop that most code has: an expert after the other, its rows gathered and added back."""
    def run(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            given = linear(_gated(linear(x[rows], mixture.gate_up_proj[expert])), mixture.down_proj[expert])
            y.index_add_(0, rows, given * weights[rows, places, None])
        return y

    return run


def _read(mixture: Any, tokens: int) -> Form:
    """As many bytes as the experts have that so many tokens choose, from the next place in all experts' weights."""
    words = mixture.gate_up_proj.view(torch.int32).flatten()
    experts = mixture.gate_up_proj.shape[0]
    one = words.numel() // experts * 3 // 2
    starts = itertools.cycle(range(0, words.numel(), max(1, one // 2)))

    def run(x: Tensor, chosen: Tensor, weights: Tensor) -> None:
        size, left = one * int(chosen.unique().numel()), words.numel()
        start = next(starts) % words.numel()
        while size > 0:
            taken = min(size, left - start)
            words[start : start + taken].sum(dtype=torch.int32)
            size, start = size - taken, 0

    return run


def choices(experts: int, tokens: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """One random choice after the other, without end, the weights of x's dtype."""
    made = [torch.rand(tokens, experts, dtype=torch.float32).topk(TOP).indices for _ in range(CHOICES)]
    weights = torch.rand(tokens, TOP, dtype=torch.float32).to(dtype)
    return itertools.cycle([(chosen, weights) for chosen in made])


def times(made: Mapping[str, Form], mixture: Any, tokens: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each form in each round."""
    experts, width = mixture.gate_up_proj.shape[0], mixture.down_proj.shape[1]
    x = torch.randn(tokens, width, dtype=torch.float32).to(mixture.down_proj.dtype)
    chosen = choices(experts, tokens, x.dtype)
    found: dict[str, list[float]] = {name: [] for name in made}
    for form in made.values():
        form(x, *next(chosen))
    end = time.perf_counter() + seconds
    while len(found["ours"]) < 5 or time.perf_counter() < end:
        for name, form in made.items():
            given = next(chosen)
            start = time.perf_counter()
            form(x, *given)
            found[name].append((time.perf_counter() - start) * 1e3)
    return found


if __name__ == "__main__":
    main()
