"""Mixtures that keep experts as modules in a list (Switch Transformers) become one op; the model computes and generates what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

import sparsify_compiler as sc
from sparsify_compiler.call import clone_structure, instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.library_experts import give_experts
from sparsify_compiler.library_experts_listed import find_listed_experts
from sparsify_compiler.ops import experts_ffn

SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_heads": 2, "decoder_start_token_id": 0, "num_layers": 2,
         "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "router_jitter_noise": 0.5}
BOTH = {0: "batch", 1: "tokens"}


def switch(make: type[PreTrainedModel], capacity: int) -> PreTrainedModel:
    """With weights so large that different prompts are answered differently."""
    torch.manual_seed(0)
    model = make(SwitchTransformersConfig(**SIZES, expert_capacity=capacity)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def ops(program: Any) -> list[Any]:
    return [node for _, node in program.nodes() if node.target is experts_ffn.op]


@pytest.mark.parametrize("capacity", [64, 2])
def test_switch_is_one_op_that_drops_tokens_beyond_the_capacity(capacity: int) -> None:
    model = switch(SwitchTransformersEncoderModel, capacity)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(1, 64, (2, 9))
    program = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": BOTH, "attention_mask": BOTH})
    assert list(program.regions) == [""]
    (op,) = ops(program)
    assert op.meta["path"] == "encoder.block.1.layer.1.mlp.experts"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(dict(instantiate(program).named_parameters())) <= set(before) | {"shared.weight"}
    longer = torch.randint(1, 64, (3, 14))
    with torch.no_grad():
        found, expected = (one(input_ids=longer, attention_mask=torch.ones_like(longer))[0] for one in (instantiate(program), model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_switch_generates_what_the_library_does() -> None:
    model = switch(SwitchTransformersForConditionalGeneration, 3)
    ids = torch.randint(1, 64, (2, 9))
    program = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]},
                      {"input_ids": BOTH, "attention_mask": BOTH, "decoder_input_ids": {0: "batch", 1: "said"}})
    assert "encoder" in program.regions  # which the library calls with output_router_logits, a name that is in its **kwargs
    assert len(ops(program)) == 2
    copy, prompt = instantiate(program), torch.randint(1, 64, (3, 7))
    options = {"attention_mask": torch.ones_like(prompt), "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    found, expected = copy.generate(prompt, **options), model.generate(prompt, **options)  # type: ignore[operator]
    assert torch.equal(found, expected)
    assert len(set(expected.flatten().tolist())) > 4


def test_switch_compiles_and_its_experts_can_go() -> None:
    model = switch(SwitchTransformersEncoderModel, 64)
    ids = torch.randint(1, 64, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compiled = sc.compile(model, batch, recipe="lower()")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0], rtol=1e-4, atol=1e-4)
    smaller = sc.Pipeline.parse("drop_experts(density=0.5)").run(capture(model, batch), sc.passes_api.Context(batches=[batch]))
    assert [node.kwargs["gate"].meta["val"].shape[0] for node in ops(smaller)] == [2]


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.wi, self.act, self.wo = nn.Linear(width, hidden, bias), activation, nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(self.act(self.wi(x)))
        return y


class Experts(nn.ModuleList):
    """As Switch computes them, for any number of choices; `power` is 1 there."""

    power = 1

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self):
            row, place = torch.where(asked[:, :, number] > 0)
            y.index_add_(0, row, expert(x[row]) * weights[row, place, None] ** self.power)
        return y


class Squared(Experts):
    power = 2


class Counted(Experts):
    """Keeps how often each expert was asked, which one op would not."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__(experts)
        self.used = nn.Buffer(torch.zeros(len(experts)))

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        self.used += asked.sum((0, 1))
        return super().forward(x, asked, weights)


class First(Experts):
    """Takes the first choice alone: alike where a row has one."""

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, asked[:, :1], weights[:, :1])


class Last(Experts):
    """Doubles what its last expert gives."""

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, asked, weights * (1 + asked[..., -1]))


class Ensemble(Experts):
    """Adds up all of them, whatever is asked."""

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = torch.stack([expert(x) for expert in self]).sum(0)
        return y


class Picky(Experts):
    """Takes six rows."""

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        assert len(x) == 6
        return super().forward(x, asked, weights)


class Backwards(Expert):
    """Has its second linear before its first."""

    def __init__(self, width: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.wo, self.act, self.wi = nn.Linear(hidden, width, False), nn.ReLU(), nn.Linear(width, hidden, False)


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, asked, weights)
        return y


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 6), st.booleans(), st.integers(0, 99))
def test_listed_experts_compute_what_the_loop_does(width: int, experts: int, hidden: int, k: int, rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Mixture(Experts([Expert(width, hidden, bias, nn.SiLU()) for _ in range(experts)])).eval()
    asked = one_hot(torch.rand(rows, experts).argsort(-1)[:, :k], experts)  # none twice in a row
    asked[torch.rand(asked.shape[:2]) < 0.3] = 0
    weights = torch.randn(rows, asked.shape[1])
    given_ = torch.randn(rows, width), asked, weights
    private = give_experts(model, clone_structure)
    assert type(private.get_submodule("experts")) is not Experts
    torch.testing.assert_close(private(*given_), model(*given_), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("experts", "why"), [
    (Squared([Expert(4, 6, False, nn.ReLU()) for _ in range(3)]), "a way of its own"),
    (Experts([Expert(4, 6, False, nn.Hardswish()) for _ in range(3)]), "no kernel for its activation"),
    (Experts([Expert(4, 6, False, nn.ReLU()), Expert(4, 6, False, nn.SiLU())]), "no kernel for its activation"),
    (Experts([Expert(4, 6, False, nn.BatchNorm1d(6)) for _ in range(3)]), "no kernel for its activation"),
    (Experts([Expert(4, hidden, False, nn.ReLU()) for hidden in (5, 6)]), "a way of its own"),
    (Experts([Expert(4, 6, bias, nn.ReLU()) for bias in (True, False)]), "a way of its own"),
    (Experts([Backwards(4, 6) for _ in range(3)]), "a way of its own"),
    *((kind([Expert(4, 6, False, nn.ReLU()) for _ in range(9)]), "a way of its own") for kind in (Counted, First, Last, Ensemble, Picky)),
])  # fmt: skip
def test_what_computes_otherwise_stays_as_it_is(experts: nn.Module, why: str) -> None:
    model = Mixture(experts).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert why in str(find_listed_experts(model)["experts"])
    assert give_experts(model, clone_structure) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # nor did the question change it


class Factor(Experts):
    def factor(self) -> float:
        return 2.0


class Scaled(Mixture):
    """Asks more of its mixture than forward(), and has a second one that does not fit."""

    def __init__(self) -> None:
        super().__init__(Factor([Expert(4, 6, False, nn.ReLU()) for _ in range(3)]))
        self.others = Squared([Expert(4, 6, False, nn.ReLU()) for _ in range(3)])

    def forward(self, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, asked, weights) * self.experts.factor() + self.others(x, asked, weights)  # type: ignore[operator]
        return y


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mixture_keeps_its_methods_and_takes_a_choice_of_any_dtype_beside_others_and_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given_ = torch.randn(6, 4), one_hot(torch.arange(12).view(6, 2) % 3, 3).to(dtype), torch.rand(6, 2)
    model = Scaled().eval()
    private = give_experts(model, clone_structure)
    assert private is not model
    torch.testing.assert_close(private(*given_), model(*given_), rtol=1e-4, atol=1e-5)
    alone = Experts([Expert(4, 6, False, nn.ReLU()) for _ in range(3)]).eval()
    program = capture(alone, given_)
    assert len(ops(program)) == 1
    torch.testing.assert_close(instantiate(program)(*given_), alone(*given_), rtol=1e-4, atol=1e-5)
