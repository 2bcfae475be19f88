"""Pipelines as text, as YAML and as objects; and what happens around a pass when they run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsify_compiler import catalog
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, InputError, ParseError, SparsifyError, UnknownNameError, VerifyError
from sparsify_compiler.instruments import Dump, Fuel, Instrument, Progress, SameNumbers, Timer, Verify, from_environment
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.pipeline import Pipeline, parse_value, print_value
from sparsify_compiler.program import Program, Stage, set_tensor

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _sample(plugins) -> None:
    plugins()


def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (torch.randn(3, 4),))


def option_pass(**options):
    return catalog.get("pass", "every_option")(**options)


# --- text and YAML ---------------------------------------------------------------------------------------------------------------------

odd = ["None", "True", "NM(n=2, m=4)", "2:4", "lambda", "été", "a|b", "'", '"', "\n", "\x85", "\u2028", "1e5", "nan", "no", "~"]
texts = st.text(max_size=12) | st.sampled_from(odd)
floats = st.floats(allow_nan=False)
ints = st.integers(-10**20, 10**20)


def grids():
    return st.builds(lambda *a: catalog.get("structure", "grid")(*a), st.integers(1, 9), ints, texts)


@st.composite
def every_option(draw):
    options = st.fixed_dictionaries({}, optional={
        "count": ints, "ratio": floats, "title": texts, "maybe": st.none() | st.booleans(),
        "either": ints | texts.filter(lambda t: not _reads_as_int(t)),
        "sizes": st.lists(ints, max_size=3).map(tuple), "names": st.lists(texts, max_size=3).map(tuple), "pair": st.tuples(texts, floats),
        "mode": st.sampled_from(["fast", "slow"]), "keep": st.sampled_from(Preserves), "grid": st.none() | grids(),
        "grids": st.lists(grids(), max_size=2).map(tuple)})
    return option_pass(**draw(options))


def _reads_as_int(text: str) -> bool:
    return text.strip().lstrip("-").isdigit()


calm = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


@calm
@given(st.lists(every_option(), max_size=3))
def test_text_and_yaml_are_inverses(passes) -> None:
    pipeline = Pipeline(tuple(passes))
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline
    assert str(Pipeline.from_yaml(pipeline.to_yaml())) == str(pipeline), "types are kept too (1 and 1.0 are equal)"


@calm
@given(st.recursive(st.none() | st.booleans() | ints | floats | texts, lambda v: st.lists(v, max_size=3) | st.lists(v, max_size=3).map(tuple)
                    | st.dictionaries(texts, v, max_size=3), max_leaves=8))
def test_every_plain_value_prints_and_parses(value) -> None:
    assert repr(parse_value(print_value(value))) == repr(value)


def test_text_of_a_pass() -> None:
    grid = catalog.get("structure", "grid")(2, 4, "x y")
    pipeline = Pipeline((option_pass(), option_pass(title="bare_name", ratio=1.0, sizes=(3,), grid=grid)))
    assert str(pipeline) == "every_option() | every_option(ratio=1.0, title=bare_name, sizes=(3,), grid=Grid(rows=2, columns=4, label='x y'))"
    assert Pipeline.parse("every_option(grid=Grid(rows=2)) | fold_batchnorm")[0].grid.rows == 2
    assert Pipeline.parse("") == Pipeline(())
    assert Pipeline.parse("  \n every_option(\n   count=3)\n")[0].count == 3
    assert type(Pipeline.parse("every_option(ratio=1)")[0].ratio) is float


def test_a_recipe_in_text_stands_for_its_passes() -> None:
    twice = Pipeline((option_pass(count=5), option_pass(count=6)))
    assert Pipeline.parse("twice(count=5) | fold_batchnorm()") == twice | Pipeline.parse("fold_batchnorm")
    with pytest.raises(ParseError, match=r"no option 'cuont'[\s\S]*count"):
        Pipeline.parse("twice(cuont=5)")


@pytest.mark.parametrize(("text", "wrong"), [
    ("every_option(cuont=1)", "column 20: 'every_option' has no option 'cuont'\n  did you mean count"),
    ("every_option(count=x)", "option 'count' must be int, got 'x'"),
    ("every_option(count=True)", "option 'count' must be int, got True"),
    ("every_option(count=1.5)", "must be int"),
    ("every_option(sizes=(1, 'a'))", "must be tuple"),
    ("every_option(pair=(a, 1, 2))", "must be tuple"),
    ("every_option(mode=fst)", "must be 'fast' or 'slow'"),
    ("every_option(keep=vlaues)", "did you mean values"),
    ("every_option(grid=Grid(rows=0))", "a grid has rows"),
    ("every_option(grid=Grdi(rows=1))", "'Grdi'\n  did you mean grid"),
    ("every_option(grid=Grid(row=1))", "no option 'row'\n  did you mean rows"),
    ("every_option(3)", "column 14: an option without its name: 3"),
    ("every_option(**x)", "not allowed"),
    ("every_option(count=1+1)", "not a plain value: 1+1"),
    ("every_option(count=__import__('os').getpid())", "not a pass"),
    ("every_option(title=f'{1}')", "not a plain value"),
    ("every_option() | 3", "column 18: not a pass: 3"),
    ("every_option() || x", "cannot read"),
    ("every_option(", "cannot read"),
    ("a.b()", "not a pass"),
])
def test_what_cannot_be_read_is_named(text: str, wrong: str) -> None:
    with pytest.raises(SparsifyError) as caught:
        Pipeline.parse(text)
    assert isinstance(caught.value, ParseError | UnknownNameError)
    assert wrong in str(caught.value)


def test_unknown_pass_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="fold_batchnorm"):
        Pipeline.parse("fold_batchnom()")


def test_yaml_forms(tmp_path: Path) -> None:
    text = "pipeline:\n- fold_batchnorm\n- every_option:\n    sizes: [1, 2]\n    grid: !Grid {rows: 3}\n- every_option: {grid: 'Grid(rows=3)'}\n"
    pipeline = Pipeline.from_yaml(text)
    assert pipeline[1].sizes == (1, 2)
    assert pipeline[1].grid == pipeline[2].grid == catalog.get("structure", "grid")(3)
    file = tmp_path / "p.yaml"
    file.write_text(pipeline.to_yaml())
    assert Pipeline.from_yaml(file) == Pipeline.from_yaml(str(file)) == pipeline


@pytest.mark.parametrize(("text", "wrong"), [
    ("pipeline: 3", "a list of passes"), ("", "a list of passes"), ("other: []", "a list of passes"),
    ("- 3", "not a pass"), ("- {a: {}, b: {}}", "not a pass"),
    ("- every_option: [1]", "not a pass"), ("- every_option: {cuont: 1}", "did you mean count"), ("- [", "not YAML"),
    ("- every_option: {title: !!python/object/apply:os.getpid []}", "not YAML"), ("- every_option: {grid: !Grid 3}", "line 1, column 24"),
    ("- every_option: {grid: !Gird {}}", "Grid"), ("- every_option: {count: '7x'}", "must be int"),
])
def test_bad_yaml_is_named(text: str, wrong: str) -> None:
    with pytest.raises(SparsifyError) as caught:
        Pipeline.from_yaml(text)
    assert wrong.lower() in str(caught.value).lower()


def test_a_missing_file_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot read the file"):
        Pipeline.from_yaml("nowhere.yaml")


def test_what_is_no_plain_value_does_not_print() -> None:
    for value in (object(), torch.zeros(1), math.nan, lambda: 0):
        with pytest.raises(ParseError):
            print_value(value)


def test_composition() -> None:
    a, b, c = option_pass(count=1), option_pass(count=2), option_pass(count=3)
    assert a | b | c == Pipeline((a, b, c)) == Pipeline((a,)) | Pipeline((b, c)) == a | Pipeline((b, c))
    assert len(a | b) == 2
    assert (a | b | c)[1:] == b | c
    with pytest.raises(InputError, match="not a pass"):
        Pipeline(("fold_batchnorm",))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Pipeline((a,)) | 3


# --- running ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Double(Pass):
    """Doubles the output of the first linear, or breaks something else, as the test asks."""

    how: str = "values"
    preserves: ClassVar[Preserves] = Preserves.VALUES

    def run(self, program: Program, ctx: Context) -> Program:
        region = program.regions[""]
        node = next(n for n in region.graph.nodes if n.target is aten.linear.default)
        if self.how == "crash":
            raise ZeroDivisionError("oops")
        if self.how == "typed":
            raise InputError("bad option", where="here", hint="do better")
        if not ctx.spend():
            return program
        with region.graph.inserting_after(node):
            new = region.graph.call_function(aten.mul.Tensor, (), {"self": node, "other": 2})
        new.meta = {**node.meta, "by": self.name()}
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if self.how == "output":
            output = next(n for n in region.graph.nodes if n.op == "output")
            output.args = ((new,),)
        if self.how == "positional":
            new.args, new.kwargs = (node, 2), {}
        if self.how == "tensor":
            set_tensor(region.module, "0.weight", nn.Parameter(torch.zeros(8, 4)))
        return program


@dataclass(frozen=True)
class Late(Pass):
    needs_stage: ClassVar[Stage] = Stage.PACKED
    until_stage: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program, ctx: Context) -> Program:
        return program


@dataclass(frozen=True)
class ToPacked(Pass):
    gives_stage: ClassVar[Stage | None] = Stage.PACKED

    def run(self, program: Program, ctx: Context) -> Program:
        return program


@dataclass(frozen=True)
class Needy(Pass):
    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        return {"0": frozenset({"norm"})}

    def run(self, program: Program, ctx: Context) -> Program:
        assert ctx.statistics is not None
        assert float(ctx.statistics.get("0", "norm")) == 7
        return program


def test_the_given_program_is_never_touched() -> None:
    before = program()
    text, weight, stage = before.text(), before.regions[""].module.state_dict()["0.weight"].clone(), before.stage
    for how in ("values", "tensor"):
        after = Pipeline((Double(how), ToPacked())).run(before)
        assert after.text() != text
        assert after.stage is Stage.PACKED
        assert before.text() == text
        assert before.stage is stage
        assert torch.equal(before.regions[""].module.state_dict()["0.weight"], weight)


def test_stages_are_checked_before_anything_runs() -> None:
    ran: list[str] = []
    with pytest.raises(InputError, match="stage packed to lowered, and would get one at stage traced"):
        Pipeline((Double(), Late())).run(program(), None, [Progress(lambda what, done, total: ran.append(what))])
    assert not ran
    Pipeline((ToPacked(), Late())).run(program())
    with pytest.raises(InputError, match="from stage traced to sparse"):
        Pipeline((ToPacked(), Double())).run(program())


def test_statistics_are_asked_for_when_needed() -> None:
    asked: list[Mapping[str, frozenset[str]]] = []

    class Found:
        def get(self, site: str, statistic: str) -> torch.Tensor:
            return torch.tensor(7.0)

    def calibrate(program: Program, needs: Mapping[str, frozenset[str]]) -> Found:
        asked.append(needs)
        return Found()

    Pipeline((Double(), Needy())).run(program(), Context(calibrate=calibrate))
    assert asked == [{"0": frozenset({"norm"})}]
    Pipeline((Needy(),)).run(program(), Context(statistics=Found()))
    with pytest.raises(CalibrationError, match=r"pass needy: needs statistics \(norm\) of 1 sites"):
        Pipeline((Needy(),)).run(program())


def test_errors_name_the_pass_and_the_node() -> None:
    with pytest.raises(SparsifyError, match=r"pass double, node linear: the pass failed with ZeroDivisionError: oops") as caught:
        Pipeline((Double("crash"),)).run(program())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(InputError, match="pass double, here: bad option\n  do better") as typed:
        Pipeline((Double("typed"),)).run(program())
    assert typed.value.where == "pass double, here"


def test_a_broken_graph_is_refused_after_its_pass() -> None:
    with pytest.raises(VerifyError, match=r"pass double, node mul_tensor: .*by position"):
        Pipeline((Double("positional"),)).run(program())
    with pytest.raises(VerifyError, match=r"output 0 was torch.float32 \[3, 2\], now torch.float32 \[3, 8\]"):
        Pipeline((Double("output"),)).run(program())


# --- instruments -----------------------------------------------------------------------------------------------------------------------


def test_same_numbers_names_the_pass_and_the_output() -> None:
    for example in (None, (torch.randn(3, 4),)):
        with pytest.raises(VerifyError, match="pass double: output 0 differs by"):
            Pipeline((option_pass(), Double())).run(program(), Context(example_inputs=example), [SameNumbers()])
    Pipeline((option_pass(),)).run(program(), None, [SameNumbers(), Verify()])


def test_verify_recomputes_shapes() -> None:
    class Wrong(Double):
        def run(self, program: Program, ctx: Context) -> Program:
            program = super().run(program, ctx)
            mul = next(n for _, n in program.nodes() if n.target is aten.mul.Tensor)
            mul.meta["val"] = mul.meta["val"].new_empty(1, 1)
            return program

    Pipeline((Wrong(),)).run(program(), None, [])
    with pytest.raises(VerifyError, match=r"node mul_tensor: the graph says torch.float32 \[1, 1\], the op gives torch.float32 \[3, 8\]"):
        Pipeline((Wrong(),)).run(program(), None, [Verify()])


def test_dump_timer_progress_fuel(tmp_path: Path) -> None:
    timer, seen = Timer(), []
    instruments: list[Instrument] = [Dump(tmp_path), timer, Progress(lambda *step: seen.append(step)), Fuel(1)]
    after = Pipeline((Double(), option_pass(), Double())).run(program(), None, instruments)
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["00_input.txt", "01_double.txt", "02_every_option.txt", "03_double.txt"]
    assert (tmp_path / "03_double.txt").read_text() == after.text()
    assert after.text().count("aten.mul.Tensor") == 1, "the second rewrite had no fuel"
    assert [name for name, _ in timer.seconds] == ["double", "every_option", "double"]
    assert seen[-1] == ("done", 3, 3)


def test_instruments_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIFY_DEBUG", f"dump={tmp_path},verify, numbers,timer,fuel=3")
    assert [type(i).__name__ for i in from_environment()] == ["Dump", "Verify", "SameNumbers", "Timer", "Fuel"]
    monkeypatch.setenv("SPARSIFY_DEBUG", "numbers")
    with pytest.raises(VerifyError, match="differs by"):
        Pipeline((Double(),)).run(program())
    Pipeline((Double(),)).run(program(), None, ())
    for bad in ("nubmers", "fuel", "fuel=x"):
        with pytest.raises(InputError, match="SPARSIFY_DEBUG"):
            from_environment(bad)
