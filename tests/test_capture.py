"""Capture: whole models and regions, calls at other sizes, and every wrong input with its typed error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from sparsify_compiler.call import CapturedModule, flatten_call, instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.capture_verify import close
from sparsify_compiler.errors import CaptureError, InputError, ModelError
from sparsify_compiler.program import Program, get_tensor
from sparsify_compiler.shapes import example_shape


def agrees(model: nn.Module, program: Program, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        expected, actual = model(*args, **kwargs), instantiate(program)(*args, **kwargs)
    a, b = torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(actual)
    return type(expected) is type(actual) and all(close(p, q) for p, q in zip(a, b, strict=True) if isinstance(p, Tensor))


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two linears whose weights are one, the second stored transposed; structured inputs and outputs; a constant argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.third.weight = nn.Parameter(x(4, 4).t())

    def forward(self, data: dict[str, Any], flag: bool = True, extra: Tensor | None = None) -> Any:
        y = self.third(self.second(self.first(data["a"]) + data["b"][0]))
        y = y if extra is None else y + extra
        return {"y": y, "rest": (y + 1, 3, None)} if flag else y


def net_inputs(batch: int = 2) -> dict[str, Any]:
    return {"a": x(batch, 4), "b": [x(batch, 4) + 1]}


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Program]:
    model = Net().eval()
    return model, capture(model, (net_inputs(), True), {"data": {0: "batch"}})


# whole models


@pytest.mark.parametrize("name", zoo.WHOLE)
def test_whole(name: str) -> None:
    model, inputs, program = zoo.captured(name)
    assert list(program.regions) == [""]
    assert program.left_out == ()
    assert agrees(model, program, **inputs)
    for tensor_name, tensor in program.regions[""].module.named_parameters():
        assert tensor is get_tensor(model, tensor_name)  # shared, under its own name
    for _, node in program.nodes():
        assert "by" in node.meta or node.op == "output"


@pytest.mark.parametrize(("name", "sizes"), [("bert", ((1, 1), (1, 5), (3, 1), (5, 64))), ("llama", ((1, 1), (4, 11))), ("mpnet", ((1, 9), (3, 1)))])
def test_other_sizes(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    model, inputs, program = zoo.captured(name)
    for batch, length in sizes:
        ids = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(0))
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert agrees(model, program, **given)


def test_a_range_that_the_model_sets() -> None:
    _, inputs, program = zoo.captured("bert")
    assert program.regions[""].spec.ranges == {"batch": (1, None), "seq": (1, 64)}
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(InputError, match=r"input_ids: dimension 1 \('seq'\) is 65; the captured model takes 1 to 64"):
        instantiate(program)(**{**inputs, "input_ids": ids, "attention_mask": ids})


class Window(nn.Module):
    """As DeBERTa's: rows of a table within a distance that is computed as a tensor, divided by a root that is a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.project = nn.Parameter(x(32, 4)), nn.Linear(4, 4)

    def forward(self, data: Tensor) -> Tensor:
        span = torch.tensor(min(data.shape[0], 16))
        scale = torch.sqrt(torch.tensor(data.shape[-1], dtype=torch.float) * 3)
        return data @ (self.project(self.table[16 - span : 16 + span]) / scale).T


def test_sizes_that_come_out_of_a_tensor_are_those_of_the_example() -> None:
    model = Window().eval()
    program = capture(model, (x(5, 4),), ({0: "rows"},))
    assert list(program.regions) == [""]
    shapes = [example_shape(region, node, (x(5, 4),)) for region, node in program.nodes() if node.target is torch.ops.aten.linear.default]
    assert shapes == [(10, 4)]
    for rows in (5, 1, 9, 20):
        assert agrees(model, program, x(rows, 4))


def test_an_example_of_size_one() -> None:
    model = zoo.Mixer().eval()
    program = capture(model, (x(1, 3, 32, 32),), {0: {0: "batch"}})
    assert agrees(model, program, x(5, 3, 32, 32))
    assert agrees(model, program, x=x(1, 3, 32, 32))


def test_tied_and_transposed_weights_and_structures(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    assert program.aliases == {"second.weight": "first.weight"}
    assert not get_tensor(program.regions[""].module, "third.weight").is_contiguous()
    assert agrees(model, program, net_inputs(7))
    result = instantiate(program)(net_inputs(3), flag=True)
    assert list(result) == ["y", "rest"]
    assert result["rest"][1:] == (3, None)


def test_under_no_grad_and_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).eval()
    with torch.inference_mode():
        program = capture(model, (x(2, 4),), ({0: "batch"},))
        assert agrees(model, program, x(3, 4))
    assert instantiate(program)(x(2, 4)).requires_grad


def test_variable_positional_arguments() -> None:
    class Add(nn.Module):
        def forward(self, *parts: Tensor, scale: float = 1.0) -> Tensor:
            return (parts[0] + parts[1]) * scale

    program = capture(Add().eval(), (x(2, 4), x(2, 4)), {0: {0: "n"}, 1: {0: "n"}})
    assert agrees(Add().eval(), program, x(5, 4), x(5, 4))


def test_the_model_is_left_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            y: Tensor = self.linear(x) * self.calls
            return y

    model = Counts().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = capture(model, (x(2, 4),))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert program.left_out[0].reason == "it writes to its buffer calls"
    assert list(program.regions) == ["linear"]


# regions


def test_control_flow_on_data() -> None:
    model, inputs, program = zoo.captured("branching")
    assert list(program.regions) == ["up", "left"]
    assert "Python control flow depends on the data" in program.left_out[0].reason
    assert {part.path: part.reason for part in program.left_out}["right"] == "it is not called on the example inputs"
    assert agrees(model, program, **inputs)
    assert agrees(model, program, x=-inputs["x"][:1])  # the other branch, which stayed Python, at another size
    left = program.regions["left"]
    assert get_tensor(left.module, "0.weight") is model.left[0].weight


def test_generate_with_a_cache() -> None:
    model, inputs, program = zoo.captured("llama_cached")
    assert {path.rpartition(".")[2] for path in program.regions} == {"q_proj", "k_proj", "v_proj", "o_proj", "mlp", "lm_head"}
    assert len(program.regions) == 11
    reasons = {part.path: part.reason for part in program.left_out}
    assert reasons[""] == "it returns a DynamicCache, which is no tensor or plain container"
    # transformers renamed the argument between 5.23 and 5.24
    why = reasons["model.layers.0.self_attn"]
    assert re.fullmatch("its argument '(past_key_values|cache)' is a DynamicCache, which is no tensor or plain value", why)
    assert reasons["model.embed_tokens"] == "it looks rows up, which is no matrix product"
    captured, ids = instantiate(program), inputs["input_ids"][:1]
    with torch.no_grad():
        wanted, got = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, captured))
    assert torch.equal(wanted, got)
    assert captured.config.hidden_size == 36
    assert captured.model.layers[0].self_attn.q_proj.in_features == 36  # what neighbours may read of a module that became a region


def test_siblings_share_one_export_but_not_their_weights() -> None:
    model, _, program = zoo.captured("llama_cached")
    for i in range(2):
        region = program.regions[f"model.layers.{i}.mlp"]
        assert get_tensor(region.module, "up_proj.weight") is model.model.layers[i].mlp.up_proj.weight
        assert {n.meta["path"] for n in region.graph.nodes if n.op == "call_function"} >= {f"model.layers.{i}.mlp.up_proj"}


def test_nothing_can_be_captured() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(CaptureError, match="no part of the model could be captured"):
        capture(Opaque().eval(), (x(2, 4),))


# calls that do not fit


@pytest.mark.parametrize(("args", "kwargs", "message"), [
    (({"a": x(5, 4), "b": [x(4, 4)]},), {}, "data_b_0: dimension 0 .'batch'. is 4, but dimension 0 of data_a has the same name and is 5"),
    (({"a": x(5, 3), "b": [x(5, 4)]},), {}, "data_a: dimension 1 is 3, but was captured with the fixed size 4"),
    (({"a": x(5, 4).double(), "b": [x(5, 4)]},), {}, "data_a: has dtype torch.float64, but was captured with torch.float32"),
    (({"a": x(5, 4).to_sparse(), "b": [x(5, 4)]},), {}, "data_a: has layout torch.sparse_coo, but was captured as a dense tensor"),
    (({"a": x(4), "b": [x(5, 4)]},), {}, "data_a: has 1 dimensions, but was captured with 2"),
    (({"a": x(5, 4), "b": x(5, 4)},), {}, "the structure of the arguments differs"),
    ((net_inputs(), False), {}, "flag: is bool False, but was captured with True"),
    ((net_inputs(),), {"fleg": 1}, "fleg: this argument was not among the example inputs(.|\n)*did you mean flag"),
    ((net_inputs(),), {"data": 1}, "argument 'data' is given twice"),
    ((), {}, "data: this argument is missing"),
    (({"a": 1.0, "b": [x(5, 4)]},), {}, "data_a: is float 1.0, but was captured as a tensor"),
])
def test_a_call_that_does_not_fit(net: tuple[nn.Module, Program], args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    captured = instantiate(net[1])
    captured(net_inputs())
    for _ in range(2):  # a refused call is not remembered as a good one
        with pytest.raises(InputError, match=message):
            captured(*args, **kwargs)


def test_what_may_be_left_out_of_a_call(net: tuple[nn.Module, Program]) -> None:
    spec = net[1].regions[""].spec
    assert len(flatten_call(spec, (net_inputs(),), {"extra": None})) == 2  # flag as captured; None for what the example did not have
    assert [type(leaf).__name__ for leaf in spec.leaves] == ["TensorSpec", "TensorSpec", "bool"]


def test_the_fixed_size_hint_says_what_to_write() -> None:
    program = capture(nn.Linear(4, 4).eval(), (x(2, 4),))
    with pytest.raises(InputError, match=r'input: dimension 0 is 3(.|\n)*name it in dynamic=\{"input": \{0: "some_name"\}\}'):
        CapturedModule(program.regions[""])(x(3, 4))


# models and example inputs that are refused


def broken(change: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).eval()
    change(model)
    return model


def put_nan(model: Any) -> None:
    model[2].weight.data[1, 1] = float("nan")


def put_int(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m[1].train(), r"1: 1 \(Dropout\) is in training mode(.|\n)*model.eval\(\)"),
    (put_nan, "2.weight: these weights hold NaN or infinity: 2.weight"),
    (put_int, "0.weight: this weight has dtype torch.int8"),
    (lambda m: m[2].to("meta"), "2.weight: this weight is on the meta device"),
    (lambda m: m[0].register_buffer("table", torch.ones(2, 2).to_sparse()), "0.table: this weight is quantised or not a dense tensor"),
])
def test_models_that_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        capture(broken(change), (x(2, 4),))


def test_several_devices() -> None:
    from sparsify_compiler.capture_check import _check_devices

    with pytest.raises(ModelError, match="lies on several devices: a on cpu, b on meta"):
        _check_devices([("a", x(1)), ("b", torch.empty(1, device="meta"))])


def test_not_a_module() -> None:
    with pytest.raises(ModelError, match="the model is function"):
        capture(lambda x: x, (x(1),))  # type: ignore[arg-type]


@pytest.mark.parametrize(("inputs", "dynamic", "message"), [
    (x(2, 4), None, "example_inputs is Tensor; it must be a tuple(.|\n)*write .x,."),
    ({"inputs": x(2, 4)}, None, "forward.. has no argument 'inputs'(.|\n)*did you mean input"),
    ({}, None, "example_inputs do not fit forward.*missing a required argument"),
    ((x(2, 4), x(2, 4)), None, "example_inputs do not fit forward.*too many positional"),
    ((x(2, 5),), None, "the model fails on its example inputs: RuntimeError"),
    ((x(2, 4),), {"inptu": {0: "b"}}, "dynamic names 'inptu'(.|\n)*did you mean input"),
    ((x(2, 4),), {0: {2: "b"}}, "dimension 2 is out of range; the tensor has 2"),
    ((x(2, 4),), {3: {0: "b"}}, "dynamic names argument 3, but there are 1"),
    ((x(2, 4),), "batch", "dynamic is str"),
    ((x(2, 4),), {0: {0: 7}}, "dimension 0 needs a name, got 7"),
    ((x(2, 4),), {0: {1: "features"}}, "dimension 1 .'features'. is declared dynamic, but the model fixes it to 4"),
])
def test_inputs_that_are_refused(inputs: Any, dynamic: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(nn.Sequential(nn.Linear(4, 4)).eval(), inputs, dynamic)


def test_one_name_for_two_sizes() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.sum() + b.sum()

    with pytest.raises(InputError, match="dimension 'n' is 3 in b but 2 in a"):
        capture(Two().eval(), (x(2, 4), x(3, 4)), {"a": {0: "n"}, "b": {0: "n"}})


def test_a_model_that_draws_random_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.rand(1)

    with pytest.raises(CaptureError, match="does not reproduce the model: output differs by up to"):
        capture(Noisy().eval(), (x(2, 4),))


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    capture(zoo.Branching().eval(), (x(4, 16).abs(),), progress=lambda *step: seen.append(step))
    assert seen[0] == ("capture", 0, 1)
    assert seen[-1] == ("capture", 1, 1)
    assert all(done <= total for _, done, total in seen)


def test_neighbours_may_read_what_a_class_says() -> None:
    class Part(nn.Module):
        kind = "twice"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            if float(y.detach().sum()) == 12345.0:  # which no graph can hold
                return x
            return y * 2 if self.part.kind == "twice" else y

    model, x = Whole().eval(), torch.randn(3, 4)
    program = capture(model, (x,))
    assert list(program.regions) == ["part"]
    torch.testing.assert_close(instantiate(program)(x), model(x))


def test_a_model_with_an_encoder_generates() -> None:
    """generate() tells the encoder settings that the example left to the configuration: the same ones are no reason to refuse, others are."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)).eval()
    ids = torch.randint(3, 64, (2, 7))
    program = capture(model, {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
                      {"input_ids": {0: "batch", 1: "tokens"}, "decoder_input_ids": {0: "batch", 1: "said"}})
    assert "encoder" in program.regions
    copy, prompt = instantiate(program), torch.randint(3, 64, (3, 5))
    assert torch.equal(copy.generate(prompt, max_new_tokens=6), model.generate(prompt, max_new_tokens=6))  # type: ignore[operator]
    with pytest.raises(InputError, match="not among the example inputs"):
        copy.get_encoder()(input_ids=prompt, output_hidden_states=True)  # type: ignore[operator]
