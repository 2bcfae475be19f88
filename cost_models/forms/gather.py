"""Layers and FFNs that read the weights of selected inputs or neurons only (kernels/gather_rows.py, ffn_rows.py, inputs_ffn_rows.py,
predicted_ffn_rows.py; an FFN that holds neurons of a text is torch's, of those alone).

What is selected depends on the data: `density` is the share that a row selects on the average, and several rows read the union of theirs, as if they
chose independently. Beyond a few rows the layer is multiplied densely, on a weight that lies input by input.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sympy import ceiling

from sparsify_compiler.cost_models.forms import dense, streams, tiles
from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import HALVES, multiplied, units_of
from sparsify_compiler.cost_models.ops.select_linear import UNION
from sparsify_compiler.cost_models.symbols import K, M, N, density, fma, hidden, near, threads, value_bytes

FEW_ROWS = {"float32": 4, "bfloat16": 2}
ALONE = 1 << 16
ROUND = 64
FFNS = ("select_ffn", "select_inputs_ffn", "predicted_ffn", "held_ffn")
HELD = "held neurons"

product, selected, strided, taken = costs("product", "selected", "strided", "taken")
_WIDTH = ceiling(N / ROUND) * ROUND
_choosing = selected * M * K / LANES * fma
GATHERED = M * UNION * K * _WIDTH / LANES           # vectors: every row goes over what any of them selects
ROWS = Formula(UNION * K * _WIDTH * value_bytes, product * GATHERED * fma / threads + _choosing, (K * N, ALONE))


def _many(units: str) -> Formula:
    """Selected in one pass, and multiplied with all of the weight, which lies input by input."""
    return Formula(K * N * value_bytes, (product * multiplied(M, K * N, units) + strided * K * N / LANES * fma) / threads + _choosing)


NEURONS_READ = hidden * K + density * hidden * (K + N)      # weights: all of the gate, of up and down those of the selected neurons
BY_NEURON = Formula(NEURONS_READ * value_bytes, product * NEURONS_READ / LANES * fma / threads + selected * (hidden + K) / LANES * fma)
CHOSEN_READ = density * hidden * (2 * K + N)       # of all three
BY_PREDICTION = Formula(CHOSEN_READ * value_bytes, product * CHOSEN_READ / LANES * fma / threads + selected * hidden / LANES * fma)
INPUTS_READ = UNION * hidden * (2 * K + N)
BY_INPUT = Formula(INPUTS_READ * value_bytes, product * M * INPUTS_READ / LANES * fma / threads + selected * M * (hidden + 2 * K) / LANES * fma)


def _dense(units: str) -> Formula:
    """The three linears of a gated FFN, and what is between them."""
    weights, activations = hidden * (2 * K + N), M * (K + N + 3 * hidden)
    beside = strided * weights / LANES * fma + near * value_bytes * taken * activations
    return Formula(weights * value_bytes, (product * multiplied(M, weights, units) + beside) / threads)


MANY, DENSE = ({units: formula(units) for units in ("float32", *HALVES.values())} for formula in (_many, _dense))


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel that reads what is selected; of FFNs their dense forms too."""
    if op not in ("select_linear", *FFNS):
        return []
    found = _dense_ffn(values, dtype, machine) if op in FFNS else []
    if op == "held_ffn":
        held = {"hidden": math.ceil(values["density"] * values["hidden"])}
        return found + [replace(form, name=HELD, given=held, borrowed=True) for form in found if form.name == dense.EAGER]
    return found + (_sparse(op, values, dtype, units_of(dtype, machine)) if "avx512f" in machine.features else [])


def _dense_ffn(values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """Those that all three linears have."""
    shape = {**values, "N": values["hidden"], "K": math.gcd(int(values["K"]), int(values["hidden"]))}
    names = [form.name for family in (dense, tiles, streams) for form in family.offer("select_linear", shape, dtype, machine)]
    units = units_of(dtype, machine)
    return [Form(name, DENSE[units], f"ffn {name} {units} {'row' if values['M'] <= 1 else 'rows'}") for name in names]


def _sparse(op: str, values: Values, dtype: str, units: str) -> list[Form]:
    few = values["M"] <= FEW_ROWS.get(dtype, 0)
    many = f"{dtype} few" if few else f"{units} many"
    if op == "select_linear":
        return [Form("gather by input", ROWS if few else MANY[units], f"gather {many}")]
    one = values["M"] == 1
    if op == "predicted_ffn":
        found = Form("gather by prediction", BY_PREDICTION, f"gather_predicted {dtype} one")
        return [found if one else replace(found, formula=DENSE[units], fitted=f"gather_ffn {units} many", borrowed=True)]
    if op == "select_ffn":
        return [Form("gather by neuron", BY_NEURON if one else DENSE[units], f"gather_ffn {f'{dtype} one' if one else f'{units} many'}")]
    return [Form("gather by input, the FFN in one call", BY_INPUT if few else DENSE[units], f"gather_inputs_ffn {many}")]
