"""Operations and bytes of a report's rows, from what they hold."""

from __future__ import annotations

import torch
from torch import nn

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.decision import Decision
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.site_cost import fill_costs, intensity

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(8 * 4 * 4, 10)).eval()
CONV, LINEAR = 8 * 3 * 9 * 4, 10 * 128 * 4  # bytes of the weights


def _filled(*rows: Decision) -> None:
    program = capture(MODEL, (torch.zeros(2, 3, 8, 8, dtype=torch.float32),))
    fill_costs(rows, program, program)


def test_dense_rows_cost_what_they_did() -> None:
    conv = Decision("0", "conv", (8, 3, 3, 3), "float32", rows=32, dense_bytes=CONV, bytes=CONV)
    linear = Decision("2", "linear", (10, 128), "bfloat16", rows=2, dense_bytes=LINEAR // 2, bytes=LINEAR // 2)
    _filled(conv, linear)
    assert (conv.flops_before, conv.moved_before) == (2 * 32 * 8 * 27, CONV + 4 * (2 * 3 * 64 + 2 * 8 * 16))
    assert (linear.flops_before, linear.moved_before) == (2 * 2 * 10 * 128, LINEAR // 2 + 2 * 2 * (128 + 10))
    assert (conv.flops, conv.moved, linear.flops, linear.moved) == (conv.flops_before, conv.moved_before, linear.flops_before, linear.moved_before)


def test_sparse_rows_read_what_they_hold_and_selected_ones_what_they_select() -> None:
    stored = Decision("2", "linear", (10, 128), "float32", density=0.25, format="bsr", rows=2, dense_bytes=LINEAR, bytes=1500)
    selected = Decision("2", "linear", (10, 128), "float32", density=0.25, format="by input", rows=2, dense_bytes=LINEAR, bytes=LINEAR)
    _filled(stored, selected)
    around = 4 * 2 * (128 + 10)
    assert (stored.flops, stored.moved) == (0.25 * 2 * 2 * 10 * 128, 1500 + around)
    assert (selected.flops, selected.moved) == (0.25 * 2 * 2 * 10 * 128, LINEAR / 4 + around)


def test_rows_that_nobody_timed_or_that_know_better_stay() -> None:
    untimed = Decision("2", "linear", (10, 128), "float32", dense_bytes=LINEAR)
    known = Decision("2", "linear", (10, 128), "float32", rows=2, dense_bytes=LINEAR, flops_before=7.0, flops=5.0)
    _filled(untimed, known)
    assert untimed.flops is None
    assert (known.flops_before, known.flops, known.moved) == (7.0, 5.0, None)


def test_a_row_that_times_a_whole_ffn_tells_no_cost_of_its_last_weight() -> None:
    net, x = GatedFfn(32, 64).eval(), torch.randn(40, 32)
    captured = capture(net, (x,))
    packed = Pipeline.parse("select_neurons(density=0.5) | pack()").run(captured, Context(calibrate=lambda p, needs: calibrate(p, [(x,)], needs)))
    rows = [Decision(site, "linear", (32, 64), "float32", rows=1, dense_bytes=8192, bytes=8192) for site in ("down", "gate")]
    fill_costs(rows, captured, packed)
    assert rows[0].flops_before is None
    assert rows[1].flops_before == 2 * 32 * 64


def test_intensity() -> None:
    assert intensity(12.0, 3.0) == 4.0
    assert intensity(None, 3.0) is intensity(1.0, None) is intensity(1.0, 0.0) is None
