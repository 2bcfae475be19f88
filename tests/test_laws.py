"""What holds for every pass and recipe in the tree. A new one writes a test only for what no law says."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler import catalog
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.instruments import Instrument, SameNumbers, Verify
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import Example, check_preserves, outputs
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.target import Target, host

PASSES, RECIPES = catalog.names("pass"), catalog.names("recipe")
every_pass, every_recipe = pytest.mark.parametrize("name", PASSES), pytest.mark.parametrize("name", RECIPES)
PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|doi:\S+|none: \S+")


def module_of(kind: str, name: str) -> ModuleType:
    return importlib.import_module(catalog.get(kind, name).__module__)


def example(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Example]:
    """The pass's own example with random statistics in every norm: under the fresh 0 and 1, errors hide."""
    model, inputs = module_of("pass", name).example()
    model = copy.deepcopy(model).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    as_dtype = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in _items(inputs)}
    return model, as_dtype if isinstance(inputs, Mapping) else tuple(as_dtype.values())


def _items(inputs: Example) -> list[tuple[Any, Any]]:
    return list(inputs.items()) if isinstance(inputs, Mapping) else list(enumerate(inputs))


@cache
def before_lowering() -> Pipeline:
    return Pipeline.parse("mask_weights(structure=NM(n=2, m=4), density=0.5) | pack()")


def prepared(name: str, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> tuple[Program, Example]:
    """The example as a Program at the stage that the pass acts on; of `model`, where that has been made before."""
    made, inputs = example(name, dtype)
    program = capture(made if model is None else model, inputs)
    if name == "lower":  # acts on packed ops, which no model has by itself
        program = before_lowering().run(program, context(inputs))
    return program, inputs


def context(inputs: Example) -> Context:
    from sparsify_compiler.codegen import runtime

    ctx = Context(target=host(), density=0.5, example_inputs=inputs, kernels=runtime, batches=[inputs])
    ctx.calibrate = lambda program, needs: calibrate(program, [inputs], needs, cache=False)
    return ctx


def default(name: str) -> Pass:
    made: Pass = catalog.get("pass", name)()
    return made


def run(name: str, program: Program, inputs: Example, instruments: tuple[Instrument, ...] = ()) -> tuple[Program, Context]:
    ctx = context(inputs)
    return Pipeline((default(name),)).run(program, ctx, instruments), ctx


def state(model: nn.Module) -> str:
    """A hash of every parameter and buffer, by name, with its bytes."""
    found = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + data)
    return found.hexdigest()


# --- documented ------------------------------------------------------------------------------------------------------------------------


@every_pass
def test_a_pass_is_documented(name: str) -> None:
    about = catalog.describe("pass", name)
    assert set(about.fields) == set(catalog.FIELDS), f"the docstring needs the fields {', '.join(catalog.FIELDS)}"
    assert about.summary.endswith(".")
    assert PAPER.search(about.fields["Paper"]), "Paper cites an arXiv id or doi, or says `none: reason`"
    assert about.fields["Preserves"].startswith(str(default(name).preserves)), "the docstring and the class say different things"


@every_pass
def test_an_option_hides_no_method(name: str) -> None:
    for option in fields(catalog.get("pass", name)):
        assert not hasattr(Pass, option.name), f"the option {option.name!r} hides Pass.{option.name}"


@every_recipe
def test_a_recipe_is_documented_and_short(name: str) -> None:
    about = catalog.describe("recipe", name)
    assert about.summary.endswith(".")
    assert PAPER.search(about.fields.get("Paper", "")), "Paper cites an arXiv id or doi, or says `none: reason`"
    tree = ast.parse(about.file.read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    body = function.body[1:]
    assert body[-1].end_lineno - body[0].lineno + 1 <= 15, "a recipe has at most 15 lines: make the rest a pass or a table entry"
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom | ast.Import):
            names = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else [alias.name for alias in statement.names]
            assert not any(n.split(".")[0] == "torch" for n in names), "a recipe only composes passes"


# --- text ------------------------------------------------------------------------------------------------------------------------------


def round_trips(pipeline: Pipeline) -> None:
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


@every_pass
def test_a_pass_prints_and_parses(name: str) -> None:
    assert default(name).name() == name
    round_trips(Pipeline((default(name),)))


@every_recipe
def test_a_recipe_prints_and_parses(name: str) -> None:
    recipe = catalog.get("recipe", name)
    round_trips(recipe())
    assert recipe() == recipe(), "a recipe is a value"
    assert Pipeline.parse(f"{name}()") == recipe()
    for parameter in inspect.signature(recipe).parameters.values():
        assert parameter.default is not inspect.Parameter.empty, "a recipe works without any option"


# --- acts ------------------------------------------------------------------------------------------------------------------------------


@every_pass
def test_the_example_triggers_the_pass_and_is_left_alone(name: str) -> None:
    model, _ = example(name)
    before = state(model)
    program, inputs = prepared(name, model=model)
    _, ctx = run(name, program, inputs, (Verify(),))
    assert ctx.rewrites > 0, f"the example does not trigger the pass: {', '.join(map(str, ctx.misses))}"
    assert state(model) == before, "the model was modified"


@every_pass
def test_the_given_program_is_left_alone(name: str) -> None:
    program, inputs = prepared(name)
    module = instantiate(program)
    before, text = state(module), program.text()
    run(name, program, inputs)
    assert program.text() == text
    assert state(instantiate(program)) == before


@every_pass
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pass_keeps_what_it_promises(name: str, dtype: torch.dtype) -> None:
    program, inputs = prepared(name, dtype)
    after, _ = run(name, program, inputs, (SameNumbers(),))
    check_preserves(program, after, inputs, default(name).preserves)


@every_pass
def test_a_pass_is_deterministic(name: str) -> None:
    program, inputs = prepared(name)
    one, other = run(name, program, inputs)[0], run(name, program, inputs)[0]
    if name != "lower":  # measures: what is chosen depends on the machine's mood
        assert one.text() == other.text()
        assert state(instantiate(one)) == state(instantiate(other))


@every_pass
def test_a_pass_is_idempotent_where_it_says_so(name: str) -> None:
    program, inputs = prepared(name)
    once, _ = run(name, program, inputs)
    item = default(name)
    order = tuple(Stage)
    if not item.idempotent or order.index(once.stage) > order.index(item.until_stage):
        return
    twice, ctx = run(name, once, inputs)
    assert twice.text() == once.text()
    assert state(instantiate(twice)) == state(instantiate(once))
    assert ctx.rewrites == 0


@every_pass
def test_the_golden_text_of_the_example(name: str, golden: Any) -> None:
    if name == "lower":
        pytest.skip("what lowering chooses is measured")
    program, inputs = prepared(name)
    golden(name, run(name, program, inputs)[0].text())


@every_pass
def test_the_result_saves_and_loads(name: str, tmp_path: Any) -> None:
    from sparsify_compiler.artefact import load

    program, inputs = prepared(name)
    after, _ = run(name, program, inputs)
    CompiledModel(after, host()).save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(loaded(*args, **kwargs))
        expected = torch.utils._pytree.tree_leaves(CompiledModel(after, host())(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# What two linear layers do not have, a residual stream for one: recipe -> the pass whose example has it.
ACTS_ON = {"slicegpt": "rotate_stream", "pat": "rotate_stream"}


@every_recipe
def test_a_recipe_runs_on_two_linear_layers(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), (torch.randn(4, 32),)
    if name in ACTS_ON:
        model, inputs = example(ACTS_ON[name])
    program = capture(model, inputs)
    before = state(model)
    after = catalog.get("recipe", name)().run(program, context(inputs))
    check_preserves(program, after, inputs, Preserves.SIGNATURE)
    assert state(model) == before
    assert all(bool(o.isfinite().all()) for o in outputs(after, inputs))


def test_there_is_something_to_check() -> None:
    assert {"fold_batchnorm", "merge_conv_branches", "mask_weights", "pack", "lower"} <= set(PASSES)
    assert {"magnitude", "wanda"} <= set(RECIPES)
    assert isinstance(host(), Target)
