"""recover(): the zeros stay, the loss falls, runs stop for a reason, and refuse what cannot be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler import catalog, recover_loop, training
from sparsify_compiler.distillation import Seen
from sparsify_compiler.errors import InputError, ParseError, UnknownNameError
from sparsify_compiler.recover_loop import Course, Loop, endless
from sparsify_compiler.recovery import KEPT_POINTS, Point, Recovery

DATA = [(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]


class Residual(nn.Module):
    """Two residual FFNs and a head."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x)
        return y


def dense(**options: int) -> nn.Module:
    torch.manual_seed(0)
    return Residual(**options).eval()


def sparse(recipe: str = "mask_weights(structure='2:4', ignore=('head',))") -> tuple[nn.Module, Any, nn.Module]:
    model = dense()
    module, hook = sc.attach(model, DATA[0], recipe)
    return module, hook, model


def distance(module: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((module(*x) - model(*x)).square().mean()) for x in DATA)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_it_comes_back_and_keeps_its_zeros() -> None:
    module, hook, model = sparse()
    before, start, masks = copy.deepcopy(model), distance(module, model), {name: mask.clone() for name, mask in hook.masks.items()}
    told: list[int] = []
    trained, recovery = sc.recover(module, model, DATA, hook=hook, steps=60, rate=1e-2, progress=lambda what, done, total: told.append(done))
    assert trained is module
    assert distance(module, model) < 0.3 * start
    assert same(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(mask, hook.masks[name]) for name, mask in masks.items())
    assert recovery.losses == ["squarehead", "outputs"]
    assert (recovery.steps, recovery.stopped, len(recovery.points)) == (60, "all steps are done", 60)
    assert recovery.points[-1].loss < recovery.points[0].loss
    assert told == sorted(told)
    assert told[-1] == 1000
    packed = sc.Pipeline.parse("pack()").run(sc.capture(trained, DATA[0]))
    assert [row.format for row in packed.decisions.values() if row.format != "dense"] == ["nm"] * 4


def test_packed_weights_come_back_by_the_states_of_every_block() -> None:
    recipe = "mask_weights(score='magnitude', structure='4x1', density=0.5, ignore=('head',))"
    masked, packed = (sparse(f"{recipe}{end}") for end in ("", " | pack()"))
    assert list(packed[1].blocks) == list(masked[1].blocks)
    assert len(packed[1].blocks) == 2
    assert all(sorted(p.numel() for p in found) == [16, 32, 256, 256] for found in packed[1].blocks.values())
    module, hook, model = packed
    start = distance(module, model)
    module, recovery = sc.recover(module, model, DATA, hook=hook, steps=60, rate=1e-2)
    assert recovery.losses == ["squarehead", "outputs"]
    assert distance(module, model) < 0.5 * start
    assert all(abs(float(mask.double().mean()) - 0.5) < 0.01 for mask in hook.masks.values())


def test_without_a_hook_a_copy_is_trained() -> None:
    module, _, model = sparse()
    before = copy.deepcopy(module.state_dict())
    trained, _ = sc.recover(module.eval(), model, DATA, steps=20, rate=1e-2, losses="outputs")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert distance(trained, model) < distance(module, model)
    weight = trained.state_dict()["blocks.0.0.weight"] * trained.state_dict()["blocks.0.0.weight_mask"]
    assert float((weight == 0).double().mean()) == 0.5


@pytest.mark.parametrize("name", catalog.names("distillation"))
def test_losses_are_zero_at_the_teacher_and_ignore_padding(name: str) -> None:
    loss = catalog.get("distillation", name)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    tokens = torch.tensor([[True] * 5, [True, True, False, False, False]])

    def seen(x: Tensor, real: Tensor | None = tokens) -> Seen:
        return Seen((x,), (x, 2 * x), real, (torch.stack([x, 2 * x], 1).log_softmax(-1),))

    assert float(loss(seen(one), seen(one))) == pytest.approx(0, abs=1e-6)
    assert float(loss(seen(other), seen(one))) > 0
    assert float(loss(seen(other), seen(one), weight=3.0)) == pytest.approx(3 * float(loss(seen(other), seen(one))))
    padded = other.clone()
    padded[1, 2:] = 100
    assert float(loss(seen(padded), seen(one))) == pytest.approx(float(loss(seen(other), seen(one))))
    assert float(loss(seen(padded, None), seen(one, None))) != pytest.approx(float(loss(seen(other), seen(one))))
    student = other.double().requires_grad_()
    loss(seen(student), seen(one.double())).backward()
    assert student.grad is not None
    assert not bool(student.grad[1, 2:].any())


def test_the_formulas_of_the_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    ours, theirs = Seen((s,), (s, 3 * s), None), Seen((t,), (t, 2 * t), None)
    ratio = [functional.mse_loss(a, b) / b.square().mean() for a, b in ((s, t), (3 * s, 2 * t))]
    assert float(catalog.get("distillation", "squarehead")(ours, theirs)) == pytest.approx(float(sum(ratio)) / 2)
    assert float(catalog.get("distillation", "outputs")(ours, theirs)) == pytest.approx(float(ratio[0]))
    pooled = functional.mse_loss(s.mean(1), t.mean(1)) / t.mean(1).square().mean()
    assert float(catalog.get("distillation", "embeddings")(ours, theirs)) == pytest.approx(float(pooled))
    mean = (functional.mse_loss(s, t) + functional.mse_loss(3 * s, 2 * t)) / 2
    assert float(catalog.get("distillation", "hidden_states")(ours, theirs)) == pytest.approx(float(mean))
    soft = functional.kl_div((s / 2).log_softmax(-1).flatten(0, 1), (t / 2).softmax(-1).flatten(0, 1), reduction="batchmean")
    assert float(catalog.get("distillation", "logits")(ours, theirs, temperature=2.0)) == pytest.approx(4 * float(soft), rel=1e-5)


@given(st.integers(0, 7), st.integers(1, 9), st.sampled_from((1.0, 2.5)), st.integers(1, 20), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_slope_of_the_logits_loss_is_that_of_its_formula(rows: int, classes: int, heat: float, together: int, padded: bool, half: bool) -> None:
    generator, dtype = torch.Generator().manual_seed(rows * 10 + classes), torch.bfloat16 if half else torch.float32
    ours, theirs = (torch.randn(2, rows, classes, generator=generator).to(dtype).transpose(0, 1) for _ in range(2))
    tokens = torch.rand(rows, 2, generator=generator) < 0.5 if padded else None
    student, plain = ours.clone().requires_grad_(), ours.float().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsify_compiler.passes.train.distillations.logits.NUMBERS", together)
        found = catalog.get("distillation", "logits")(Seen((student,), (), tokens), Seen((theirs,), (), tokens), weight=3.0, temperature=heat)
    s, t = (x.float().div(heat).log_softmax(-1) for x in (plain, theirs))
    each = (t.exp() * (t - s)).sum(-1)
    wanted = 3 * heat**2 * (each.mean() if tokens is None else (each * tokens).sum() / tokens.sum().clamp_min(1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    found.backward()
    wanted.backward()
    assert student.grad is not None
    assert plain.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.float(), plain.grad, rtol=2e-2 if half else 1e-4, atol=1e-3 if half else 1e-6)


def test_a_class_that_both_rule_out_adds_nothing_to_the_logits_loss() -> None:
    loss = catalog.get("distillation", "logits")
    s, t = (torch.tensor([[[float("-inf"), *row]]], dtype=torch.float32) for row in ([1.0, 0.0], [0.5, 2.0]))
    student = s.clone().requires_grad_()
    found = loss(Seen((student,), (), None), Seen((t,), (), None))
    found.backward()
    assert float(found.detach()) == pytest.approx(float(loss(Seen((s[..., 1:],), (), None), Seen((t[..., 1:],), (), None))))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[0, 0, 0]) == 0


def test_attention_weights_are_those_of_the_model_and_are_distilled() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                     max_position_embeddings=16, attn_implementation="eager", pad_token_id=0, initializer_range=0.5)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    batch = {"input_ids": torch.randint(1, 50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    module, hook = sc.attach(model, batch, "mask_weights(density=0.5)")
    _, plain = watched = sc.attach(model, batch, sc.Pipeline(()))
    watched[0](**batch)
    expected = model(**batch, output_attentions=True).attentions
    assert len(plain.attentions()) == 1
    for found, weights in zip(plain.attentions().values(), expected, strict=True):
        torch.testing.assert_close(found.exp(), weights, rtol=1e-4, atol=1e-6)
    _, recovery = sc.recover(module, model, [batch], hook=hook, steps=25, rate=1e-2, losses=("attention_maps", "squarehead(weight=0.1)"))
    assert recovery.points[-1].loss < 0.5 * recovery.points[0].loss


def test_the_rate_warms_up_and_falls() -> None:
    course = Course(10.0, 100, 1.0, 0.1, 1.0, 0.0, 1, 10, 3)
    rates = [course.rate_at(course.done(step, 0.0)) for step in range(101)]
    assert rates[:11] == pytest.approx([0.01, *(step / 10 for step in range(1, 11))])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    timed = Course(10.0, None, 1.0, 0.0, 1.0, 0.0, 1, 10, 3)
    assert timed.rate_at(timed.done(7, 300.0)) == pytest.approx(0.5)
    assert timed.done(7, 100.0, begun=100.0) == 0
    assert timed.done(7, 300.0, begun=100.0, measuring=100.0) == 0.5
    assert timed.done(7, 500.0, begun=100.0, measuring=100.0) == 1
    assert timed.done(1, 400.0, begun=450.0, measuring=1000.0) == 1
    assert course.done(7, 599.0) == 0.07
    assert course.done(7, 600.0) == 1


def clocked(monkeypatch: pytest.MonkeyPatch, course: Course, seconds: Callable[[int], float], metric: float | None = None) -> Recovery:
    """What a run does whose steps and whose metric take so long by a clock of their own, behind 30 seconds of preparation."""
    clock, count = [30.0], [0]
    monkeypatch.setattr(recover_loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    module, hook, _ = sparse()

    def loss(batch: Any) -> Tensor:
        clock[0] += seconds(count[0])
        count[0] += 1
        value: Tensor = module(*batch).square().mean()
        return value

    def measured(trained: nn.Module) -> float:
        clock[0] += metric or 0.0
        return 1.0

    loop = Loop(module, hook, loss, course, record=Recovery(), metric=None if metric is None else measured, show=lambda *done: None, started=0.0)
    return loop.run(DATA)


@pytest.mark.parametrize("slow", [1, 10])
def test_what_comes_before_the_second_step_is_no_part_of_the_way(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute of preparation and a first step that builds kernels for as long: the rate still warms up, and falls to nothing at the end,
    although the steps in the middle are slower than the others."""
    course = Course(2.0, None, 1.0, 0.1, 1.0, 0.0, 1, 10, 99)
    record = clocked(monkeypatch, course, lambda step: 30.0 if not step else slow * 0.2 if 50 < step < 60 else 0.2)
    rates = [point.rate for point in record.points]
    assert rates[:2] == [0.01, 0.01]
    assert rates[2:31] == sorted(rates[2:31])
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert rates[32:] == sorted(rates[32:], reverse=True)
    assert rates[-1] < 1e-3
    assert record.seconds == pytest.approx(120, abs=0.3)


def test_the_last_measurement_is_within_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    record = clocked(monkeypatch, Course(5.0, None, 1.0, 0.0, 1.0, 0.0, 1, 4, 99), lambda step: 1.0, metric=20.0)
    assert [point.quality for point in record.points].count(1.0) == 4
    assert record.points[-1].quality is not None
    assert record.points[-1].rate < 1e-3
    assert 299 <= record.seconds <= 301


@pytest.mark.parametrize("moves", ["", " | move_masks(grow='random', drop='magnitude', every=3, until=9)"])
def test_the_average_of_the_weights_is_what_is_handed_back(moves: str) -> None:
    """By hand, on the weights that a run without it goes through; grown weights start anew in it."""
    recipe = f"mask_weights(score='random', density=0.5){moves}"
    seen: list[dict[str, Tensor]] = []
    module, hook, model = sparse(recipe)
    sc.recover(module, model, DATA, hook=hook, steps=10, rate=1e-2, checks=10, patience=99, quality=lambda trained: seen.append(
        copy.deepcopy(trained.state_dict())) or 0.0 - len(seen))
    module, hook, _ = sparse(recipe)
    _, record = sc.recover(module, model, DATA, hook=hook, steps=10, rate=1e-2, average=0.5)
    assert record.stopped == "all steps are done"
    expected = {name: value.clone() for name, value in seen[1].items()}
    for step, state in enumerate(seen[2:], 2):
        share = min(0.5, (1 + step) / (10 + step))
        for name in expected:
            if f"{name}_mask" in state:  # what came is new at 0
                came = state[f"{name}_mask"] & ~seen[step - 1][f"{name}_mask"]
                expected[name] = expected[name].masked_fill(came, 0)
            expected[name] = state[name] if state[name].dtype == torch.bool else share * expected[name] + (1 - share) * state[name]
    for name, value in module.state_dict().items():
        kept = module.state_dict().get(f"{name}_mask", torch.ones_like(value, dtype=torch.bool))
        torch.testing.assert_close(value[kept], expected[name][kept], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, seen[10][name]) for name, value in module.state_dict().items())


def test_the_average_of_packed_weights_moves_with_their_places() -> None:
    """As with masks, to rounding, over steps in which weights go and come."""
    found = []
    for end in ("", " | pack()"):
        model = dense()
        module, hook = sc.attach(model, DATA[0], f"mask_weights(score='random', density=0.5) | move_masks(grow='gradient', every=3, until=9){end}")
        sc.recover(module, model, DATA, hook=hook, steps=10, rate=1e-2, average=0.8, losses="outputs")
        found.append(hook.weights())
    assert len(found[0]) == 5
    for masked, packed in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(packed, masked, rtol=1e-4, atol=1e-6)


def test_the_average_is_what_is_measured() -> None:
    seen: list[dict[str, Tensor]] = []
    module, hook, model = sparse()
    _, record = sc.recover(module, model, DATA, hook=hook, steps=10, rate=1e-2, average=0.9, checks=5,
                           quality=lambda trained: seen.append(copy.deepcopy(trained.state_dict())) or float(len(seen)))
    assert all(torch.equal(value, seen[-1][name]) for name, value in module.state_dict().items())
    plain, hook, _ = sparse()
    _, expected = sc.recover(plain, model, DATA, hook=hook, steps=10, rate=1e-2)
    assert not same(plain, module)
    assert [point.loss for point in record.points] == [point.loss for point in expected.points], "training goes on from the weights"


def test_a_schedule_of_masks_that_is_cut_short_is_told() -> None:
    model = dense()
    for steps, early in ((4, 16), (25, 0)):
        module, hook = sc.attach(model, DATA[0], sc.recipes.gmp(density=0.5, steps=20, every=2))
        _, recovery = sc.recover(module, model, DATA, hook=hook, steps=steps)
        assert recovery.early == early
        compiled = sc.finalize(module, DATA[0], recovery=recovery)
        assert bool([one for one in compiled.report().warnings if "16 steps before the schedule" in one]) == bool(early)
    module, hook = sc.attach(model, DATA[0], sc.recipes.rigl(density=0.5, steps=20))
    assert hook.ends == 0, "the density is there from the start"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_it_with_the_last_good_weights(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_loop, "SAVE_EVERY", -1.0)
    expected, hook, model = sparse()
    sc.recover(expected, model, iter(DATA[:3]), hook=hook, minutes=5, warmup=0.0)
    module, hook, _ = sparse()
    _, recovery = sc.recover(module, model, iter([*DATA[:3], (torch.full((16, 16), bad),), DATA[3]]), hook=hook, minutes=5, warmup=0.0)
    assert "step 4: the last good weights, of step 3, are kept" in recovery.stopped
    assert recovery.steps == 3
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-3, atol=1e-5)  # rates depend on the clock


def test_it_stops_early_and_the_best_is_kept() -> None:
    module, hook, model = sparse()
    seen: list[dict[str, Tensor]] = []

    def quality(trained: nn.Module) -> float:
        seen.append(copy.deepcopy(trained.state_dict()))
        return [0.1, 0.5, 0.9, 0.2, 0.3, 0.4][len(seen) - 1]

    _, recovery = sc.recover(module, model, DATA, hook=hook, steps=100, checks=10, patience=2, quality=quality)
    assert recovery.stopped == "no better for 2 measurements"
    assert (recovery.before, recovery.best, recovery.best_step, recovery.steps) == (0.1, 0.9, 20, 40)
    assert all(torch.equal(value, seen[2][name]) for name, value in module.state_dict().items())
    assert [p.quality for p in recovery.points if p.quality is not None] == [0.5, 0.9, 0.2, 0.3]


def test_gradients_are_clipped_weights_decay_and_batches_are_averaged() -> None:
    """Under Adam a gradient far below its epsilon moves nothing: what is left of a step is the decay, at the rate of that step."""
    start = sparse()[0].state_dict()
    for decay in (0.0, 5.0):
        module, hook, model = sparse()
        sc.recover(module, model, DATA, hook=hook, steps=2, rate=0.02, warmup=0.0, clip=1e-14, decay=decay)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), start[name] * (1 - 0.02 * decay) * (1 - 0.01 * decay), rtol=1e-5, atol=1e-6)
    losses = []
    for accumulate in (1, 3):
        module, hook, model = sparse()
        _, recovery = sc.recover(module, model, DATA[:1], hook=hook, steps=1, accumulate=accumulate)
        losses.append(recovery.points[0].loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_optimizer_of_a_recovery_is_told_what_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hook, model = sparse("mask_weights(score='random', density=0.25) | move_masks(grow='random', every=1, until=2)")
    told: list[Any] = []

    def forget(optimizer: torch.optim.Optimizer, anew: training.Anew) -> None:
        told.append((type(optimizer), bool((anew.carry(torch.ones(anew.shape, dtype=torch.float32)) == 0).any())))

    monkeypatch.setattr(training, "forget", forget)
    sc.recover(module, model, DATA, hook=hook, steps=3)
    assert told == [(torch.optim.AdamW, True)] * 2 * len(hook.masks)


def test_what_the_hook_adds_to_the_loss_counts() -> None:
    losses = []
    for penalty in (0.0, 2.0):
        module, hook, model = sparse(f"mask_weights(structure='2:4') | move_masks(straight_through=True, penalty={penalty}, every=1)")
        _, recovery = sc.recover(module, model, DATA, hook=hook, steps=1)
        losses.append(recovery.points[0].loss)
    module, hook, _ = sparse("mask_weights(structure='2:4')")
    under = sum(float((module.get_parameter(f"{name}.weight").detach() * ~mask).square().sum()) for name, mask in hook.masks.items())
    assert losses[1] - losses[0] == pytest.approx(under, rel=1e-4)


def test_no_measurement_is_lost_while_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six in a minute of steps that take a second, of which one save takes ten."""
    clock = [0.0]
    monkeypatch.setattr(recover_loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    module, hook, _ = sparse()

    def loss(batch: Any) -> Tensor:
        clock[0] += 1.0
        value: Tensor = module(*batch).square().mean()
        return value

    def write(*state: Any) -> None:
        clock[0] += 10.0

    file: Any = SimpleNamespace(read=lambda *state: None, write=write)
    course = Course(1.0, None, 1e-3, 0.0, 1.0, 0.0, 1, 6, 99)
    loop = Loop(module, hook, loss, course, record=Recovery(), metric=lambda trained: 1.0, file=file, show=lambda *done: None, started=0.0)
    record = loop.run(DATA)
    assert [point.seconds for point in record.points if point.quality is not None] == [11, 21, 31, 42, 51, 60]


def test_time_and_data_run_out() -> None:
    module, hook, model = sparse()
    _, recovery = sc.recover(module, model, iter(DATA), hook=hook, minutes=5)
    assert (recovery.steps, recovery.stopped) == (4, "the data ran out")
    _, recovery = sc.recover(module, model, DATA, hook=hook, minutes=1e-9, dtype=torch.bfloat16)
    assert (recovery.steps, recovery.stopped) == (0, "the time is up")
    assert [x for x, _ in zip(endless([(1,), (2,)], skip=3), range(3), strict=False)] == [(2,), (1,), (2,)]


def test_under_bfloat16_and_with_named_batches() -> None:
    module, hook, model = sparse()
    start = distance(module, model)
    sc.recover(module, model, [{"x": x} for x, in DATA], hook=hook, steps=40, rate=1e-2, dtype=torch.bfloat16, losses=("hidden_states", "logits"))
    assert module.get_parameter("head.weight").dtype is torch.float32
    assert distance(module, model) < 0.5 * start


def test_a_long_curve_is_thinned_out() -> None:
    record = Recovery()
    for step in range(10 * KEPT_POINTS):
        record.add(Point(step, 0.0, 1.0, 1.0, 0.5 if step % 1000 == 0 else None))
    assert len(record.points) <= 2 * KEPT_POINTS
    assert sum(point.quality is not None for point in record.points) == 5
    assert [p.step for p in record.points] == sorted(p.step for p in record.points)


def test_bad_input_is_refused() -> None:
    module, hook, model = sparse()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"teacher": dense(width=16, blocks=3)}, InputError, "states have shapes"),
        ({"teacher": nn.Sequential(nn.Linear(16, 5)).eval(), "losses": "squarehead"}, InputError, "teacher has no states"),
        ({"teacher": nn.Sequential(nn.Linear(16, 4)).eval()}, InputError, "outputs have shapes"),
        ({"batches": []}, InputError, "no batch"),
        ({"batches": DATA[0][0]}, InputError, "iterable of tuples"),
        ({"batches": [DATA[0][0]]}, InputError, "a batch is a tuple or a dict"),
        ({"minutes": 0}, InputError, "minutes is a number above 0"),
        ({"rate": math.nan}, InputError, "rate is a number above 0"),
        ({"steps": 0}, InputError, "steps is a number of 1 or more"),
        ({"warmup": 1.0}, InputError, "warmup lies in"),
        ({"average": 1.0}, InputError, "average lies in"),
        ({"losses": "attention_maps"}, InputError, "student has no attention"),
        ({"losses": ()}, InputError, "no loss"),
        ({"losses": "squarehed"}, UnknownNameError, "squarehead"),
        ({"losses": "logits(heat=2.0)"}, ParseError, "no option"),
        ({"quality": lambda trained: float("nan")}, InputError, "returned nan"),
    ]
    for options, error, message in wrong:
        given = {"teacher": model, "batches": DATA, "hook": hook, "steps": 3, **options}
        with pytest.raises(error, match=message):
            sc.recover(module, given.pop("teacher"), given.pop("batches"), **given)
    module.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of this model is trained"):
        sc.recover(module, model, DATA, hook=hook, steps=3)
