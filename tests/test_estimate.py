"""Estimates: FLOPs, bytes and times of a model on a machine that is not here, in the terminal and from the shell."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from kernel_help import needs_avx512
from test_predict import made_up
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import sparsify_compiler as sc
from sparsify_compiler import machines
from sparsify_compiler import measure as timing
from sparsify_compiler.cli import main
from sparsify_compiler.codegen import cache, micro
from sparsify_compiler.cost_models.machine import UNITS
from sparsify_compiler.errors import TargetError
from sparsify_compiler.estimates import TRIED, Estimate
from sparsify_compiler.target import host

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval(), (torch.randn(64, 256),)
"""


class Small(nn.Module):
    """Two layers that are alike, one that is not, a convolution, attention, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(1000, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


@pytest.fixture(scope="module")
def small() -> Estimate:
    return sc.estimate(Small().eval(), (torch.zeros(2, 16, dtype=torch.long),), "cortex-a76")


def test_flops_are_those_that_torch_counts(small: Estimate) -> None:
    with FlopCounterMode(display=False) as counter:
        Small().eval()(torch.zeros(2, 16, dtype=torch.long))
    assert small.to_json()["total"]["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)  # sums and the like are counted here, not there


def test_every_layer_has_a_time_and_what_bounds_it(small: Estimate) -> None:
    assert [site.site for site in small.sites] == ["conv", "q", "k", "v"]
    assert [site.rough for site in small.sites] == [True, False, False, False]
    assert {site.rows for site in small.sites} == {32}
    assert all(site.ms > 0 and site.bound in ("compute", "memory", "overhead") for site in (*small.sites, small.others))
    assert small.ms == pytest.approx(sum(site.ms for site in small.sites) + small.others.ms)
    assert small.others.bytes < 100_000, "of a table, what is looked up is read"


def test_sparsity_never_makes_it_slower(small: Estimate) -> None:
    times = [small.ms_at(density) for density in TRIED]
    assert times == sorted(times, reverse=True)
    assert times[0] <= small.ms


@pytest.mark.parametrize(("taps", "machine"), [(1, "cortex-a76"), (3, "neoverse-v2")])
def test_convolutions_are_told_what_sparsity_gives(taps: int, machine: str) -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, taps, padding=taps // 2), nn.Conv2d(256, 256, 3, padding=1, groups=256)).eval()
    sparse, grouped = sc.estimate(model, (torch.zeros(1, 256, 28, 28),), machine).sites
    assert [best.density for best in sparse.best] == [0.5, 0.3, 0.1]
    assert all(best.kernel.startswith("planes") for best in sparse.best[1:])
    assert sparse.best[2].ms < sparse.best[1].ms < sparse.ms
    assert grouped.rough
    assert not grouped.best


@needs_avx512
def test_inputs_are_selected_of_linear_layers_alone() -> None:
    """Of a convolution there is no such kernel, though over one pixel it is a layer."""
    model = nn.Sequential(nn.Conv2d(512, 512, 1), nn.Flatten(1), nn.Linear(512, 512)).eval()
    conv, linear = sc.estimate(model, (torch.zeros(1, 512, 1, 1),), made_up(host())).sites
    assert linear.best[0].structure == "selected inputs"
    assert "selected inputs" not in [best.structure for best in conv.best]


def test_large_layers_gain_more_on_the_machine_that_has_kernels() -> None:
    model, x = nn.Sequential(nn.Linear(1024, 1024)).eval(), (torch.randn(64, 1024),)
    board, gpu = sc.estimate(model, x, "cortex-a76"), sc.estimate(model, x, "h200")
    assert board.ms > gpu.ms
    assert board.sites[0].best[-1].structure == "16x1"
    assert {best.structure for best in gpu.sites[0].best} == {"ideal"}
    assert "ideal: there are no sparse kernels" in str(gpu)


def test_the_table_has_layers_that_are_alike_on_one_line() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    text = str(sc.estimate(nn.ModuleDict({"a": layers})["a"], (torch.randn(8, 64),), "neoverse-n1"))
    assert "×4" in text
    assert "the model" in text
    assert "Estimated, for no data sheet says it: call, gathers, wake" in text
    assert max(map(len, text.splitlines())) <= 150


def test_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "my_model.py:make", "--target", "neoverse-v2", "--json", "e.json"]) == 0
    assert "NVIDIA Grace" in capsys.readouterr().out
    found = json.loads(Path("e.json").read_text(encoding="utf-8"))
    assert found["sites"][0]["flops"] == 2 * 64 * 256 * 512
    assert set(found["total"]["ms_at_density"]) == {"0.5", "0.3", "0.1"}
    assert main(["estimate", "my_model.py:make", "--target", "cortex-a67"]) == 2
    assert "did you mean cortex-a76" in capsys.readouterr().err
    assert main(["targets"]) == 0
    assert "apple-m1" in capsys.readouterr().out


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_measured", machines._measured.__wrapped__)  # as a new process would
    monkeypatch.setattr(machines._measured, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(micro, "AWAY", (1 << 15, 1 << 18))
    monkeypatch.setattr(micro, "SECONDS", 1e-5)
    monkeypatch.setattr(timing, "waited", lambda: 0.0)
    runs = []
    measured = micro.measured
    monkeypatch.setattr(micro, "measured", lambda target: runs.append(target) or measured(target))
    assert machines.measured_host() is None
    machine, again = machines.machine("native"), machines.machine()
    assert len(runs) == machines.RUNS
    assert machines.measured_host() == machine
    assert machine == again
    assert machine.features == host().features
    assert all(number.value > 0 for name, number in machine.numbers.items() if name != "wake")
    assert main(["targets", "--measure"]) == 0
    assert len(runs) == 2 * machines.RUNS
    assert "measured here" in capsys.readouterr().out
    assert cache.warnings() is not None


def test_a_measurement_is_the_mean_of_now_and_of_all_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_measured", machines._measured.__wrapped__)
    monkeypatch.setattr(machines._measured, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(timing, "waited", lambda: 0.0)
    speed = itertools.count(1.0)

    def measured(target: object) -> dict[str, object]:
        now = next(speed)
        return {"cores": 1, "numbers": dict.fromkeys(UNITS, now), "memory": [{"bytes": 1, "one": now, "all": now / 2, "cold": 2.0},
                                                                             {"bytes": 2, "one": 9.0, "all": now, "cold": 1.0}]}

    monkeypatch.setattr(micro, "measured", measured)
    assert machines.measure_host().numbers["vector"].value == 2.0       # of 1, 2 and 3
    machine = machines.measure_host()
    assert machine.numbers["vector"].value == (5.0 + 3.5) / 2           # of 4, 5 and 6, and of all six
    assert [level.one for level in machine.memory] == [4.25, 4.25]      # what lies farther away comes no faster
    assert [level.all for level in machine.memory] == [4.25, 4.25]      # and all cores are no slower than one
    assert [level.cold for level in machine.memory] == [2.0, 2.0]


def test_a_machine_that_was_busy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_measured", machines._measured.__wrapped__)
    monkeypatch.setattr(timing, "waited", itertools.count(0.0, 1e6).__next__)
    one = dict.fromkeys(UNITS, 1.0)
    levels = [{"bytes": size, "one": 1.0, "all": 1.0, "cold": 0.0} for size in (1, 2)]
    monkeypatch.setattr(micro, "measured", lambda target: {"cores": 1, "numbers": one, "memory": levels})
    with pytest.warns(UserWarning, match="other programs ran while this machine was measured"):
        machines.machine()


def test_a_machine_of_which_nothing_is_known() -> None:
    with pytest.raises(TargetError, match="not int"):
        machines.machine(3)  # type: ignore[arg-type]
