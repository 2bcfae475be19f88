"""A sweep sees what the model sees: the values of the whole model's own run, with the weights as they are by then."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import unfold

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, InputError
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, get_tensor
from sparsify_compiler.sites import find_sites
from sparsify_compiler.sweep import Sweep
from sparsify_compiler.sweep_checkpoint import Checkpoint


class Block(nn.Module):
    """A pre-norm residual block with a gated FFN."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x))
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def stack(blocks: int = 2, width: int = 16, hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, hidden) for _ in range(blocks))).eval()


def batches(count: int = 3, width: int = 16) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 12, width, generator=generator),) for _ in range(count)]


def ops(program: Program) -> dict[str, fx.Node]:
    nodes = {node.name: node for _, node in program.nodes()}
    return {site.path: nodes[site.roles["op"]] for site in find_sites(program, ("linear", "conv"))}


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)


def test_without_changes_it_finds_what_calibration_finds() -> None:
    program = capture(stack(), batches()[0])
    names = {"input_norm", "input_mean", "gram", "absmax", "samples"}
    expected = calibrate(program, batches(), {path: frozenset(names) for path in ops(program)}, cache=False)
    sweep = Sweep(program, batches())
    for path, op in ops(program).items():
        found = sweep.gather({op: (*names, "patch_gram", "patch_mean", "patch_norm", "patch_rows")})[op]
        for name in names:
            assert close(found[name], expected.get(path, name)), (path, name)
        for ours, theirs in (("patch_gram", "gram"), ("patch_mean", "input_mean"), ("patch_norm", "input_norm"), ("patch_rows", "samples")):
            assert close(found[ours], expected.get(path, theirs))


def test_running_ahead_changes_nothing() -> None:
    program = capture(stack(), batches()[0])
    sites = ops(program)
    one, other = Sweep(program, batches()), Sweep(program, batches())
    all_at_once = one.gather(dict.fromkeys(sites.values(), ("patch_gram",)))
    for op in sites.values():
        assert torch.equal(other.gather({op: ("patch_gram",)})[op]["patch_gram"], all_at_once[op]["patch_gram"])
    last = list(sites.values())[-1]
    assert torch.equal(one.gather({last: ("patch_gram",)})[last]["patch_gram"], all_at_once[last]["patch_gram"])


def test_what_comes_behind_a_replaced_weight_sees_it_and_the_dense_model_beside_does_not() -> None:
    model = stack()
    program, changed = capture(model, batches()[0]), stack()
    with torch.no_grad():
        changed[0].attend.weight.mul_(0.5)
    expected = calibrate(capture(changed, batches()[0]), batches(), {"1.down": frozenset({"gram"})}, cache=False).get("1.down", "gram")
    sites = ops(program)
    sweep = Sweep(program, batches(), dense=True)
    sweep.gather({sites["0.attend"]: ("patch_gram",)})
    sweep.replace(sites["0.attend"].kwargs["weight"], changed[0].attend.weight.detach())
    found = sweep.gather({sites["1.down"]: ("patch_gram", "cross", "residual")})[sites["1.down"]]
    assert close(found["patch_gram"], expected)
    rows: dict[str, list[Tensor]] = {"dense": [], "changed": [], "short": []}
    for (x,) in batches():
        inputs: dict[str, Tensor] = {}
        for name, net in (("dense", model), ("changed", changed)):
            before = net[0](x)
            middle = before + net[1].attend(net[1].norm(before))
            h = net[1].norm(middle)
            inputs[name], inputs[f"skip {name}"] = nn.functional.silu(net[1].gate(h)) * net[1].up(h), middle
            rows[name].append(inputs[name].reshape(-1, 32))
        rows["short"].append((inputs["skip dense"] - inputs["skip changed"]).reshape(-1, 16))
    joined = {name: torch.cat(parts).detach() for name, parts in rows.items()}
    assert close(found["cross"], joined["dense"].T @ joined["changed"])
    assert close(found["residual"], joined["short"].T @ joined["changed"])
    assert float(found["residual"].abs().max()) > 0.01


def test_the_patches_of_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(2),
                          nn.Conv1d(4, 6, 3, dilation=2)).eval()
    images = [(torch.randn(2, 3, 8, 8),), (torch.randn(2, 3, 8, 8),)]
    program = capture(model, images[0])
    found = Sweep(program, images).gather(dict.fromkeys(ops(program).values(), ("patch_gram", "input_norm")))
    for op, weight in zip(ops(program).values(), (model[0].weight, model[2].weight, model[4].weight), strict=True):
        assert found[op]["patch_gram"].shape == (weight[0].numel(),) * 2
    first = torch.cat([unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27) for (x,) in images])
    assert close(found[ops(program)["0"]]["patch_gram"], first.T @ first)
    line = torch.cat([model[:4](x) for (x,) in images]).detach()
    windows = line.unfold(2, 5, 1)[..., ::2].permute(0, 2, 1, 3).reshape(-1, 12)
    assert close(found[ops(program)["4"]]["patch_gram"], windows.T @ windows)


def test_only_values_that_are_still_read_are_kept() -> None:
    program = capture(stack(6), batches()[0])
    sites = list(ops(program).values())
    sweep = Sweep(program, batches())
    for op in sites:
        sweep.gather({op: ("patch_gram",)})
        assert all(len(stream.values) <= 4 for stream in sweep._streams)


class Branching(nn.Module):
    """Stays in regions: the branch is on data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x if float(x.sum()) > 0 else -x)


def test_what_cannot_be_swept_is_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(CalibrationError, match="captured whole"):
        Sweep(capture(Branching().eval(), (x,)), [(x,)])
    program = capture(stack(), batches()[0])
    with pytest.raises(CalibrationError, match="no batch"):
        Sweep(program, [])
    with pytest.raises(InputError, match="batch 1"):
        Sweep(program, [batches()[0], (torch.randn(3),)])
    with pytest.raises(InputError, match="batch 0"):
        Sweep(program, [torch.randn(3)])  # type: ignore[list-item]
    broken = [(torch.full((1, 12, 16), float("nan")),)]
    op = ops(program)["0.attend"]
    with pytest.raises(CalibrationError, match="NaN"):
        Sweep(program, broken).gather({op: ("patch_gram",)})


# --- killed and resumed ----------------------------------------------------------------------------------------------------------------


def prune(model: nn.Module, item: MaskWeights, **context: Any) -> tuple[Program, Context]:
    ctx = Context(**{"density": 0.5, "batches": batches(), **context})
    return Pipeline((item,)).run(capture(model, batches()[0]), ctx, ()), ctx


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("inputs", ["pruned", "block"])
def test_a_killed_run_goes_on_where_it_was_with_the_same_bits(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = MaskWeights("repair", repair="obs", inputs=inputs)
    expected, _ = prune(stack(), item)
    monkeypatch.setenv("SPARSIFY_CHECKPOINT", str(tmp_path))
    cut: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KilledError

    with pytest.raises(KilledError):
        prune(stack(), item, progress=kill)
    finished = list(tmp_path.rglob("*.safetensors"))
    assert len(finished) == 5
    written: list[str] = []
    write = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, layer, tensors: (written.append(layer), write(self, layer, tensors)))
    found, _ = prune(stack(), item, progress=lambda what, done, total: cut.append(done))
    assert len(written) == 3
    assert cut == list(range(1, 9))
    same_tensors(expected, found)


@pytest.mark.parametrize("inputs", ["pruned", "block"])
def test_a_process_that_is_really_killed_loses_one_layer_at_most(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while the sixth layer is being written; the next process computes what is missing, and gets the same bits."""
    expected, _ = prune(stack(), MaskWeights("repair", repair="obs", inputs=inputs))
    monkeypatch.setenv("SPARSIFY_CHECKPOINT", str(tmp_path))
    child = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import sparsify_compiler.storage
        from test_sweep import MaskWeights, prune, stack
        from sparsify_compiler import sweep_checkpoint
        write, done = sweep_checkpoint.write_safetensors, []
        def killed(file, tensors):
            done.append(write(file, tensors))
            if len(done) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
        sweep_checkpoint.write_safetensors = killed
        prune(stack(), MaskWeights("repair", repair="obs", inputs={inputs!r}))
    """)
    assert subprocess.run([sys.executable, "-c", child], check=False).returncode == -signal.SIGKILL
    written: list[str] = []
    write = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, layer, tensors: (written.append(layer), write(self, layer, tensors)))
    found, _ = prune(stack(), MaskWeights("repair", repair="obs", inputs=inputs))
    assert len(written) == 3  # of eight: the sixth was not in its place yet
    same_tensors(expected, found)


def same_tensors(one: Program, other: Program) -> None:
    assert one.text() == other.text()
    for (region, node), (twin, _) in zip(one.nodes(), other.nodes(), strict=True):
        if node.op == "get_attr":
            assert torch.equal(get_tensor(region.module, str(node.target)), get_tensor(twin.module, str(node.target)))


def test_a_checkpoint_of_something_else_or_cut_off_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CHECKPOINT", str(tmp_path))
    item = MaskWeights("repair", repair="obs", inputs="pruned")
    expected, _ = prune(stack(), item)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 8
    files[0].write_bytes(files[0].read_bytes()[:100])
    same_tensors(prune(stack(), item)[0], expected)
    other = stack()
    with torch.no_grad():
        other[1].down.weight.mul_(2)
    prune(other, item)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 16
    prune(stack(), item, density=0.25)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 24


def test_masked_layer_by_layer_the_model_computes_what_the_sweep_saw() -> None:
    """The last layer's statistics of a sweep through a cut model are those of the cut Program."""
    program, _ = prune(stack(), MaskWeights(repair="least_squares", inputs="pruned"))
    path = "1.down"
    after = calibrate(program, batches(), {path: frozenset({"gram"})}, cache=False).get(path, "gram")
    dense = capture(stack(), batches()[0])
    sweep, sites = Sweep(dense, batches()), ops(dense)
    for name, op in ops(program).items():
        if name != path:
            product = op.kwargs["weight"]
            weight, mask = (get_tensor(program.regions[""].module, str(product.kwargs[k].target)) for k in ("self", "other"))
            sweep.replace(sites[name].kwargs["weight"], weight.detach() * mask)
    assert close(sweep.gather({sites[path]: ("patch_gram",)})[sites[path]]["patch_gram"], after)
    assert instantiate(program)(*batches()[0]).shape == (1, 12, 16)
