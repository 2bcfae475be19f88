"""Layers drawn by a seed, of the shapes, structures and densities that people prune, and torch's other operators: to fit and judge a cost model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from .work import Work

SIZES = (192, 256, 384, 576, 768, 1024, 1536, 2048, 3072, 4096)
ROWS = (1, 1, 1, 2, 4, 8, 16, 32, 64, 128, 128, 256, 512)
DENSITIES = (0.05, 0.1, 0.1, 0.2, 0.3, 0.5)
BETWEEN = (0, 1 << 24, 1 << 26, 1 << 28)
LINEARS = ("bsr", "bsr", "bsr", "nm", "csr", "csr", "condensed", "select_linear", "select_ffn", "select_inputs_ffn")
LARGEST = 5_000_000         # weights of a layer
MIXTURE = 50_000_000        # of a mixture of experts
HEADS = 8
FITTING = range(100, 200)   # seeds of layers that costs are fitted on; no others are


def elementwise(rng: random.Random) -> dict[str, float]:
    """An addition, a cast between float32 and bfloat16, a norm or a GELU."""
    written, taps = 64 * rng.choice((64, 512, 2048, 8192, 32768)), rng.choice((1, 1, 8, 20))
    if taps > 1:
        return {"taps": taps, "written": written, "read": written}
    return {"taps": 1, "written": written, "read": 2 * written} if rng.choice((1, 2)) > 1 else {
        "taps": 1, "written": written, "read": written, "x_bytes": 3}      # on the average of what is read and written


def convolution(rng: random.Random) -> dict[str, float]:
    """Of one square image."""
    side, taken, outputs = rng.choice((7, 14, 28, 56)), rng.choice((16, 32, 64, 128, 256)), rng.choice((16, 32, 64, 128, 256))
    return {"M": side**2, "N": outputs, "K": taken, "taps": rng.choice((1, 9, 9, 25)), "read": taken * side**2, "written": outputs * side**2}


def attention(rng: random.Random) -> dict[str, float]:
    """Every query with as many keys."""
    tokens, heads, width = rng.choice((32, 64, 128, 256, 512)), rng.choice((4, 8, 12)), rng.choice((32, 64))
    rows = tokens * heads
    return {"M": rows, "K": width, "E": width, "pairs": rows * tokens, "block_q": 1, "block_k": 1, "listed": 0, "read": 3 * rows * width,
            "written": rows * width}


def sparse_convolution(rng: random.Random) -> dict[str, float]:
    """Of one square image; its structure is drawn by the op."""
    side, taken, outputs = rng.choice((7, 14, 28, 56)), rng.choice((64, 128, 256, 512, 1024)), rng.choice((64, 128, 256, 512, 1024))
    taps = rng.choice((1, 1, 9)) if taken * outputs <= 1 << 16 else 1
    return {"M": side**2, "N": outputs, "K": taken, "taps": taps, "read": taken * side**2, "written": outputs * side**2,
            "density": rng.choice(DENSITIES)}


def experts(rng: random.Random) -> dict[str, float]:
    """A gated mixture of equal inputs and outputs."""
    width, hidden = rng.choice((256, 512, 1024)), rng.choice((128, 256, 512, 1024))
    count = rng.choice((4, 8, 16, 32, 64))
    while 3 * width * hidden * count > MIXTURE:
        count //= 2
    return {"M": rng.choice((1, 1, 2, 8, 16, 64, 256, 1024)), "K": width, "N": width, "hidden": hidden, "experts": count,
            "chosen": min(rng.choice((1, 2, 2, 4)), count)}


def blocks(rng: random.Random) -> dict[str, float]:
    """Of 8 heads: one token over a cache, or a text over itself."""
    width, block, keys, group = rng.choice((64, 64, 128)), rng.choice((32, 64, 128)), rng.choice((512, 1024, 2048, 4096)), rng.choice((1, 1, 4))
    queries = rng.choice((1, keys))
    wide, lines = -(-keys // block), -(-queries // block)
    count = max(1, round(wide * rng.choice((0.05, 0.1, 0.1, 0.3, 0.5))))
    return {"M": HEADS * queries, "K": width, "E": width, "block_q": min(block, queries), "block_k": block, "pairs": HEADS * lines * count,
            "listed": HEADS // group * lines * count, "group": group, "read": HEADS * queries * width + 2 * HEADS // group * keys * width,
            "written": HEADS * queries * width}


CONVS = ("conv2d_csr", "conv2d_csr", "conv2d_bsr", "conv2d_bsr", "conv2d_condensed")
KERNELS: Mapping[str, Callable[[random.Random], dict[str, float]]] = {**dict.fromkeys(CONVS, sparse_convolution), "experts_ffn": experts,
                                                                      "attend_blocks": blocks}
EAGER: Mapping[str, Callable[[random.Random], dict[str, float]]] = {"elementwise": elementwise, "conv2d": convolution, "attend": attention}
KINDS = {"linears": LINEARS, "others": tuple(EAGER), "kernels": (*CONVS, "experts_ffn", "experts_ffn", "attend_blocks", "attend_blocks")}
KINDS["all"] = (*LINEARS, *KINDS["others"], *KINDS["kernels"], "predicted_ffn", "held_ffn")      # in one draw


def draw(seed: int, count: int, kinds: Sequence[str] = LINEARS) -> list[Work]:
    """So many layers: the first ones are the same for any count."""
    rng = random.Random(seed)
    found: list[Work] = []
    while len(found) < count:
        outputs, inputs, rows = rng.choice(SIZES), rng.choice(SIZES), rng.choice(ROWS)
        dtype, between, density, kind = rng.choice(("float32", "float32", "bfloat16")), rng.choice(BETWEEN), rng.choice(DENSITIES), rng.choice(kinds)
        sizes: dict[str, float] = {"M": rows, "N": outputs, "K": inputs, "density": density}
        op = f"linear_{kind}"
        if kind == "bsr":
            sizes["r"] = rng.choice((4, 8, 16, 16, 32))
            sizes["c"] = rng.choice((1, 1, 1, sizes["r"]))
        elif kind == "nm":
            sizes["n"], sizes["m"] = rng.choice(((2, 4), (2, 4), (1, 4), (2, 8), (4, 8)))
            sizes["density"] = sizes["n"] / sizes["m"]
        elif kind == "csr":
            op = "linear_csr" if density < 1 / 16 else "linear_bitmap"
        elif kind == "select_linear":
            op, sizes["M"] = kind, rng.choice((1, 1, 1, 2, 4, 16))
        elif kind in EAGER:
            op, sizes = kind, EAGER[kind](rng)
        elif kind in KERNELS:
            op, sizes = kind, KERNELS[kind](rng)
            if kind == "conv2d_bsr":
                sizes |= {"r": rng.choice((4, 8, 16)), "c": 1}
        elif kind != "condensed":
            op, width = kind, rng.choice((384, 576, 768))
            sizes |= {"M": rng.choice((1, 1, 1, 2, 16)), "K": width, "N": width, "hidden": rng.choice((768, 1536, 2048))}
        if outputs * inputs <= LARGEST:
            found.append(Work.make(op, dtype, between, **sizes))
    return found
