"""compile(): the whole way, on models small enough for a test."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.errors import BudgetError, CalibrationError, InputError, ModelError, TargetError, UnknownNameError


class Classifier(nn.Module):
    """Wide enough that a sparse kernel can win at one weight in twenty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(512, 1024), nn.Linear(1024, 512)
        self.dropout, self.norm, self.head = nn.Dropout(0.5), nn.LayerNorm(512), nn.Linear(512, 10)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.norm(x + self.dropout(self.down(torch.relu(self.up(x)))) * scale)
        return {"logits": self.head(hidden), "hidden": hidden}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Classifier().eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(32, 512, generator=torch.Generator().manual_seed(i)),) for i in range(3)]


@pytest.fixture(scope="module")
def compiled(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> sc.CompiledModel:
    return sc.compile(model, batches[0], recipe=sc.recipes.wanda(structure="16x1"), budget=sc.Budget(density=0.05), calibration=batches,
                      dynamic={"x": {0: "batch"}})


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def masked_reference(model: nn.Module, compiled: sc.CompiledModel, tmp: Path) -> nn.Module:
    """The user's own model with the weights that the compiled model stands for."""
    from safetensors.torch import load_file

    sc.export_dense(compiled, tmp / "dense.safetensors")
    reference = Classifier().eval()
    reference.load_state_dict(load_file(tmp / "dense.safetensors"))
    return reference


@pytest.mark.parametrize("rows", [1, 7, 32, 65])
def test_the_signature_of_the_model_and_the_values_of_the_masked_one(model: nn.Module, compiled: sc.CompiledModel, rows: int,
                                                                     tmp_path: Path) -> None:
    reference, x = masked_reference(model, compiled, tmp_path), torch.randn(rows, 512)
    for result in (compiled(x), compiled(x=x), compiled(x, scale=1.0)):
        assert list(result) == ["logits", "hidden"]
        for name, want in reference(x).items():
            assert result[name].dtype == want.dtype
            torch.testing.assert_close(result[name], want, rtol=1e-4, atol=1e-4)


def test_masks_have_the_density_and_structure(model: nn.Module, compiled: sc.CompiledModel, tmp_path: Path) -> None:
    weight = masked_reference(model, compiled, tmp_path).up.weight
    assert float((weight != 0).double().mean()) == pytest.approx(0.05, abs=0.002)
    columns = (weight != 0).view(64, 16, 512)
    assert bool((columns.all(1) == columns.any(1)).all()), "blocks of 16 rows are kept or dropped together"


def test_the_model_is_not_modified(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    before = fingerprint(model)
    grads = [p.requires_grad for p in model.parameters()]
    sc.compile(model, batches[0], recipe=sc.recipes.magnitude(structure="2:4"))
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == grads
    assert not model.training


def test_saves_and_loads_bit_for_bit(compiled: sc.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "out")
    loaded, x = sc.load(tmp_path / "out"), torch.randn(32, 512)
    for name, value in compiled(x).items():
        assert torch.equal(value, loaded(x)[name])
    assert loaded.report().sites == compiled.report().sites
    assert loaded.report().compiled == compiled.report().compiled


def test_report_tells_each_site(compiled: sc.CompiledModel) -> None:
    report = compiled.report()
    assert [site.site for site in report.sites] == ["up", "down", "head"]
    for site in report.sites:
        assert site.dense_ms is not None
        assert site.reason
        assert site.density == pytest.approx(0.05, abs=0.02)
        if site.kernel == "dense" or site.format == "dense":
            assert "dense" in site.reason
    assert report.speedup is not None
    assert report.speedup == pytest.approx(report.fastest_dense.median / report.compiled.median)  # type: ignore[union-attr, operator]
    assert "up" in str(report)


def test_no_slower_than_dense_where_nothing_pays(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    never = sc.Pipeline.parse("mask_weights(density=0.5) | pack() | lower(margin=1.0)")
    compiled = sc.compile(model, batches[0], recipe=never)
    assert all(site.format == "dense" for site in compiled.report().sites)
    assert all("dense" in site.reason for site in compiled.report().sites)


def test_inference_mode_no_grad_and_grad_mode(compiled: sc.CompiledModel) -> None:
    x = torch.randn(4, 512)
    want = compiled(x)["logits"]
    with torch.inference_mode():
        assert torch.equal(compiled(x)["logits"], want)
    with torch.no_grad():
        assert torch.equal(compiled(x)["logits"], want)
    assert torch.equal(compiled(x.requires_grad_())["logits"], want)


def test_from_several_threads_at_once(compiled: sc.CompiledModel) -> None:
    x = torch.randn(32, 512)
    want, wrong = compiled(x)["logits"], []

    def call() -> None:
        for _ in range(20):
            wrong.extend([1] * (not torch.equal(compiled(x)["logits"], want)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_same_seed_same_masks(model: nn.Module, batches: list[tuple[Tensor, ...]], tmp_path: Path) -> None:
    def masks(seed: int) -> str:
        pipeline = sc.Pipeline.parse("mask_weights(score=random, density=0.3) | pack() | lower(margin=1.0)")
        return fingerprint(masked_reference(model, sc.compile(model, batches[0], recipe=pipeline, seed=seed), tmp_path))

    assert masks(1) == masks(1)
    assert masks(1) != masks(2)


def test_bytes_budget_is_met(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    compiled = sc.compile(model, batches[0], recipe=sc.recipes.magnitude(structure="16x1"), budget=sc.Budget(bytes=dense // 2))
    assert compiled.report().compiled_bytes <= dense // 2  # type: ignore[operator]
    assert min(site.density for site in compiled.report().sites) > 0.1, "no sparser than it must be"


def test_quality_budget_is_met(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    with torch.no_grad():
        answers = [model(*b)["logits"].argmax(-1) for b in batches]

    def agreement(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.cat([candidate(*b)["logits"].argmax(-1) == a for b, a in zip(batches, answers, strict=True)]).float().mean())

    compiled = sc.compile(model, batches[0], recipe="magnitude", budget=sc.Budget(quality_drop=0.1), quality=agreement)
    assert agreement(compiled) >= 0.9
    assert max(site.density for site in compiled.report().sites) < 1.0, "something was pruned"


def test_latency_budget_out_of_reach_says_what_is_in_reach(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    with pytest.raises(BudgetError, match="best that this recipe reaches"):
        sc.compile(model, batches[0], recipe="magnitude", budget=sc.Budget(latency_ms=1e-6))


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else x


def test_regions_of_a_model_that_cannot_be_exported_whole(tmp_path: Path) -> None:
    model, x = ControlFlow().eval(), torch.randn(8, 64)
    x = x if float(model.first(x).sum()) > 0 else -x
    compiled = sc.compile(model, (x,), recipe=sc.recipes.magnitude(structure="fan_in"), budget=sc.Budget(density=0.5))
    assert {"first", "second"} <= {site.site for site in compiled.report().sites}
    assert compiled.report().left_out
    assert compiled(x).shape == (8, 64)
    compiled.save(tmp_path / "out")
    assert torch.equal(sc.load(tmp_path / "out", model=model)(x), compiled(x))


@pytest.mark.parametrize(("arguments", "error", "says"), [
    ({"recipe": "wandda"}, UnknownNameError, "wanda"),
    ({"target": "cpuu"}, TargetError, r"cpu\b"),
    ({"against": ("eagle",)}, UnknownNameError, "eager"),
    ({"against": ()}, InputError, "eager"),
    ({"recipe": 3}, InputError, "recipe"),
    ({"recipe": "fold_batchnorm"}, InputError, r"fold_batchnorm\(\)"),
    ({"recipe": "magnitude", "budget": sc.Budget(density=0.5), "seed": "a"}, InputError, "seed"),
    ({"recipe": "magnitude", "budget": sc.Budget(density=0.5), "calibration": 3}, InputError, "calibration"),
    ({"recipe": "magnitude", "budget": sc.Budget(density=0.5), "calibration": torch.zeros(2)}, InputError, "calibration"),
    ({"recipe": "wanda", "budget": sc.Budget(density=0.5)}, CalibrationError, "calibration"),
    ({"recipe": "wanda", "budget": sc.Budget(density=0.5), "calibration": []}, CalibrationError, "empty|no batch"),
    ({"recipe": "magnitude"}, BudgetError, "density"),
    ({"recipe": "mask_weights(structure=NM(n=2, m=4))", "budget": sc.Budget(density=0.3)}, Exception, "0.5"),
    ({"recipe": "mask_weights(targets=('nowhere',), density=0.5)"}, Exception, "nowhere"),
    ({"recipe": "magnitude", "budget": 0.5}, BudgetError, "Budget"),
])
def test_bad_arguments(model: nn.Module, batches: list[tuple[Tensor, ...]], arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        sc.compile(model, batches[0], **arguments)
    assert isinstance(caught.value, sc.errors.SparsifyError)


def test_training_mode_is_refused(batches: list[tuple[Tensor, ...]]) -> None:
    with pytest.raises(ModelError, match="eval"):
        sc.compile(Classifier(), batches[0], recipe="magnitude", budget=sc.Budget(density=0.5))


def test_nan_weights_are_refused(batches: list[tuple[Tensor, ...]]) -> None:
    model = Classifier().eval()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"up\.weight"):
        sc.compile(model, batches[0], recipe="magnitude", budget=sc.Budget(density=0.5))


def test_tied_and_non_contiguous_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.third = nn.Linear(64, 32)
            self.third.weight = nn.Parameter(torch.randn(64, 32).T)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model, x = Tied().eval(), torch.randn(16, 64)
    compiled = sc.compile(model, (x,), recipe="magnitude", budget=sc.Budget(density=1.0))
    torch.testing.assert_close(compiled(x), model(x))
    pruned = sc.compile(model, (x,), recipe="magnitude", budget=sc.Budget(density=0.5))
    tied = [site for site in pruned.report().sites if site.site in ("first", "second")]
    assert len(tied) == 2
    assert any("shares the weight" in site.reason for site in tied)
    assert pruned(x).shape == (16, 32)


def test_what_a_graph_does_not_have_is_said() -> None:
    compiled = sc.compile(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), recipe=sc.Pipeline.parse("mask_weights(density=1.0)"))
    with pytest.raises(AttributeError, match=r"captured whole.*use_cache=True"):
        _ = compiled.generate
    assert not hasattr(compiled, "config")
    assert compiled.weight.shape == (8, 8)
