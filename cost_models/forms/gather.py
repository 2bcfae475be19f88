"""Layers and FFNs that read the weights of selected inputs or neurons only (kernels/gather_rows.py, ffn_rows.py, inputs_ffn_rows.py).

What is selected depends on the data: `density` is the share that a row selects on the average, and several rows read the union of theirs, as if they
chose independently. Beyond a few rows the layer is multiplied densely, on a weight that lies input by input.
"""

from __future__ import annotations

import math

from sympy import Expr, ceiling

from sparsify_compiler.cost_models.forms import dense, streams, tiles
from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import form_of
from sparsify_compiler.cost_models.ops.select_linear import UNION
from sparsify_compiler.cost_models.symbols import K, M, N, density, fma, hidden, near, threads, tile, value_bytes

FEW_ROWS = {"float32": 4, "bfloat16": 2}
ALONE = 1 << 16
ROUND = 64
FFNS = ("select_ffn", "select_inputs_ffn")

product, selected, strided, taken = costs("product", "selected", "strided", "taken")
_WIDTH = ceiling(N / ROUND) * ROUND
_choosing = selected * M * K / LANES * fma
GATHERED = M * UNION * K * _WIDTH / LANES           # vectors: every row goes over what any of them selects
ROWS = Formula(UNION * K * _WIDTH * value_bytes, product * GATHERED * fma / threads + _choosing, (K * N, ALONE))


def _many(multiplied: Expr) -> Formula:
    """Selected in one pass, and multiplied with all of the weight, which lies input by input."""
    return Formula(K * N * value_bytes, (product * multiplied + strided * K * N / LANES * fma) / threads + _choosing)


MANY, MANY_TILES = _many(M * K * N / LANES * fma), _many(ceiling(M / 16) * K * N / 512 * tile)

NEURONS_READ = hidden * K + density * hidden * (K + N)      # weights: all of the gate, of up and down those of the selected neurons
BY_NEURON = Formula(NEURONS_READ * value_bytes, product * NEURONS_READ / LANES * fma / threads + selected * (hidden + K) / LANES * fma)
INPUTS_READ = UNION * hidden * (2 * K + N)
BY_INPUT = Formula(INPUTS_READ * value_bytes, product * M * INPUTS_READ / LANES * fma / threads + selected * M * (hidden + 2 * K) / LANES * fma)


def _dense(multiplied: Expr) -> Formula:
    """The three linears of a gated FFN, and what is between them."""
    weights, activations = hidden * (2 * K + N), M * (K + N + 3 * hidden)
    beside = strided * weights / LANES * fma + near * value_bytes * taken * activations
    return Formula(weights * value_bytes, (product * multiplied + beside) / threads)


DENSE, DENSE_TILES = _dense(M * hidden * (2 * K + N) / LANES * fma), _dense(ceiling(M / 16) * hidden * (2 * K + N) / 512 * tile)


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel that reads what is selected; of FFNs their dense forms too."""
    if op not in ("select_linear", *FFNS):
        return []
    dense_formula = DENSE_TILES if form_of("dense eager", values["M"], dtype, machine).formula is dense.TILES else DENSE
    found = _dense_ffn(values, dtype, machine, dense_formula) if op in FFNS else []
    return found + (_sparse(op, values, dtype, dense_formula) if "avx512f" in machine.features else [])


def _dense_ffn(values: Values, dtype: str, machine: Hardware, formula: Formula) -> list[Form]:
    """Those that all three linears have."""
    shape = {**values, "N": values["hidden"], "K": math.gcd(int(values["K"]), int(values["hidden"]))}
    names = [form.name for family in (dense, tiles, streams) for form in family.offer("select_linear", shape, dtype, machine)]
    return [Form(name, formula, f"ffn {name} {dtype} {'row' if values['M'] <= 1 else 'rows'}") for name in names]


def _sparse(op: str, values: Values, dtype: str, dense_formula: Formula) -> list[Form]:
    few = values["M"] <= FEW_ROWS.get(dtype, 0)
    many = "few" if few else "many"
    if op == "select_linear":
        return [Form("gather by input", ROWS if few else MANY_TILES if dtype == "bfloat16" else MANY, f"gather {dtype} {many}")]
    if op == "select_ffn":
        one = values["M"] == 1
        return [Form("gather by neuron", BY_NEURON if one else dense_formula, f"gather_ffn {dtype} {'one' if one else 'many'}")]
    return [Form("gather by input, the FFN in one call", BY_INPUT if few else dense_formula, f"gather_inputs_ffn {dtype} {many}")]
