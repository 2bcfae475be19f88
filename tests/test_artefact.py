"""Artefacts: what was saved comes back as it was, and nothing else can come in."""

from __future__ import annotations

import collections
import copy
import io
import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_help import attention, edit_graph, edit_manifest, reseal, small, structured
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

from sparsify_compiler import artefact
from sparsify_compiler.artefact_graph import decode_tree, encode_tree, find_op
from sparsify_compiler.artefact_tensors import TensorSource, TensorStore
from sparsify_compiler.artefact_values import decode, encode
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ArtefactError, InputError, KernelError, ModelError
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.storage import read_safetensors, write_safetensors
from sparsify_compiler.target import host

Point = collections.namedtuple("Point", ["left", "right"])


@pytest.fixture(scope="module")
def lowered() -> CompiledModel:
    """Two packed layers with kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    x = torch.randn(16, 64)
    ctx = Context(target=host(), example_inputs=(x,), kernels=runtime, density=0.2)
    program = Pipeline.parse("mask_weights(structure='16x1') | pack() | lower(margin=-1000.0)").run(
        capture(model, (x,), {"input": {0: "batch"}}), ctx
    )
    return CompiledModel(program, host())


@pytest.fixture
def saved(lowered: CompiledModel, tmp_path: Path) -> Path:
    lowered.save(tmp_path / "model")
    return tmp_path / "model"


# --- what was saved comes back ------------------------------------------------------------------------------------------------------------


def test_structure_shapes_and_numbers_come_back(tmp_path: Path) -> None:
    compiled, call = structured()
    compiled.save(tmp_path / "model")
    loaded = artefact.load(tmp_path / "model")
    assert loaded.program.text() == compiled.program.text()
    before, after = compiled(**call), loaded(**call)
    assert list(after) == ["out", "more"]
    assert isinstance(after["more"], tuple)
    assert after["more"][1] == 5
    torch.testing.assert_close(after["out"], before["out"], rtol=0, atol=0)
    torch.testing.assert_close(after["more"][0], before["more"][0], rtol=0, atol=0)
    with pytest.raises(InputError):
        loaded(batch={"x": torch.randn(5, 9)}, scale=0.5)


def test_two_dynamic_dimensions_come_back(tmp_path: Path) -> None:
    compiled, call = attention()
    compiled.save(tmp_path / "model")
    loaded = artefact.load(tmp_path / "model")
    assert loaded.program.text() == compiled.program.text()
    torch.testing.assert_close(loaded(**call), compiled(**call), rtol=0, atol=0)
    before, after = ([str(node.meta.get("val")) for _, node in c.program.nodes()] for c in (compiled, loaded))
    assert [text for text in after if "Fake" not in text] == [text for text in before if "Fake" not in text]


def test_saving_again_gives_the_same_files(tmp_path: Path) -> None:
    compiled, _ = structured()
    compiled.save(tmp_path / "one")
    artefact.load(tmp_path / "one").save(tmp_path / "two")
    for name in ("graph.json", "weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_kernels_come_back(lowered: CompiledModel, saved: Path, tmp_path: Path) -> None:
    x = torch.randn(7, 64)
    expected = lowered(x)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(saved, moved)
    shutil.rmtree(saved)
    loaded = artefact.load(moved)
    assert loaded.target == host()
    assert all("kernel" in node.meta for _, node in loaded.program.nodes() if "linear_bsr" in str(node.target))
    shutil.rmtree(moved)  # nothing of the folder is needed any more
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)


def test_kernels_can_be_built_again(lowered: CompiledModel, saved: Path) -> None:
    x = torch.randn(3, 64)
    torch.testing.assert_close(artefact.load(saved, rebuild=True)(x), lowered(x))


def test_weights_are_stored_once(lowered: CompiledModel, saved: Path) -> None:
    packed = sum(t.numel() * t.element_size() for r in lowered.program.regions.values() for t in [*r.module.buffers(), *r.module.parameters()])
    assert packed <= (saved / "weights.safetensors").stat().st_size < packed + 4096


def test_no_file_is_a_pickle(saved: Path) -> None:
    names = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".binary", ".txt"}
    assert not any(path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for path in saved.rglob("*") if path.is_file())


def test_the_manifest_says_what_it_is(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert manifest["target"]["arch"] == host().arch
    assert manifest["inputs"] == {"": ["input_1: float32[batch, 64]"]}
    assert manifest["kernels"] == 2


def test_dense_weights_under_the_models_names(lowered: CompiledModel, tmp_path: Path) -> None:
    artefact.export_dense(lowered, tmp_path / "dense.safetensors")
    state = load_file(tmp_path / "dense.safetensors")
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    model.load_state_dict(state)
    x = torch.randn(4, 64)
    torch.testing.assert_close(model(x), lowered(x))
    assert float((state["0.weight"] == 0).float().mean()) > 0.75


def test_dense_weights_of_a_masked_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).eval()
    x = torch.randn(2, 16)
    program = Pipeline.parse("mask_weights(structure='2:4')").run(capture(model, (x,)), Context())
    compiled = CompiledModel(program)
    artefact.export_dense(compiled, tmp_path / "dense.safetensors")
    state = load_file(tmp_path / "dense.safetensors")
    assert set(state) == {"weight", "bias"}
    torch.testing.assert_close(nn.functional.linear(x, state["weight"], state["bias"]), compiled(x))


def test_the_report_comes_back(tmp_path: Path) -> None:
    compiled = small()
    compiled.report().warnings.append("one")
    compiled.save(tmp_path / "model")
    found = artefact.load(tmp_path / "model").report()
    assert found.warnings == ["one"]
    assert found.compiled_disk_bytes is not None
    assert artefact.read_report(tmp_path / "model") == found


class Stubborn(nn.Module):
    """Control flow on data: only the parts can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.name_of_it = "stubborn"
        self.embed = nn.Parameter(torch.randn(32, 32))
        self.first = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.second = nn.Linear(32, 8)
        self.register_buffer("shift", torch.ones(32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.embed + self.shift
        x = self.first(x) if float(x.detach().sum()) > 0 else self.first(-x)
        return self.second(x)


def test_regions_go_back_into_a_fresh_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stubborn().eval()
    x = torch.randn(4, 32)
    program = capture(model, (x,))
    assert program.skeleton is not None
    compiled = CompiledModel(program)
    assert compiled.name_of_it == "stubborn"
    torch.testing.assert_close(compiled(x), model(x))
    compiled.save(tmp_path / "model")
    with pytest.raises(InputError, match="captured in parts"):
        artefact.load(tmp_path / "model")
    fresh = Stubborn().eval()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    loaded = artefact.load(tmp_path / "model", fresh)
    torch.testing.assert_close(loaded(x), model(x))
    torch.testing.assert_close(loaded(-x), model(-x))
    assert "shift" not in loaded.state_dict()
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    CompiledModel(capture(Stubborn().eval(), (torch.randn(4, 32),))).save(tmp_path / "model")
    with pytest.raises(ArtefactError, match="is not the Stubborn that was saved"):
        artefact.load(tmp_path / "model", nn.Linear(2, 2).eval())
    other = Stubborn().eval()
    other.embed = nn.Parameter(torch.randn(32, 33))
    with pytest.raises(ArtefactError, match="'embed' has shape"):
        artefact.load(tmp_path / "model", other)


# --- values, trees, tensors ---------------------------------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.channels_last, torch.strided, torch.device("cpu"), torch.device("cuda:1"), 2 + 3j]
    )
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner), max_leaves=12
)


@given(VALUES)
def test_values_come_back(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert repr(again) == repr(value)  # nan is not equal to itself


def test_special_floats_come_back() -> None:
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode([-math.inf, math.inf])) == [-math.inf, math.inf]
    assert decode(encode(slice(1, None, 2))) == slice(1, None, 2)


@pytest.mark.parametrize(
    "value", [{"dtype": "Tensor"}, {"dtype": "load"}, {"node": "missing"}, {"unknown": 1}, {"dtype": "float32", "x": 1}, {"float": "1"}]
)
def test_values_that_nobody_wrote_are_refused(value: Any) -> None:
    with pytest.raises(ArtefactError):
        decode(value, {})


def test_an_object_cannot_be_saved() -> None:
    with pytest.raises(ArtefactError, match="cannot be saved"):
        encode(object())


@pytest.mark.parametrize(
    "tree",
    [
        (1, {"a": [2, None], "b": ()}),
        collections.OrderedDict(x=1, y=(2,)),
        Point(1, [2]),
        collections.deque([1, 2], maxlen=3),
        {1: 2},
        collections.defaultdict(list, a=1),
        {},
    ],
)
def test_trees_come_back(tree: Any) -> None:
    leaves, spec = pytree.tree_flatten(tree)
    again = pytree.tree_unflatten(leaves, decode_tree(json.loads(json.dumps(encode_tree(spec)))))
    assert again == tree
    assert type(again) is type(tree)


def test_a_hugging_face_output_comes_back() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    leaves, spec = pytree.tree_flatten(outputs.BaseModelOutputWithPooling(last_hidden_state=torch.ones(1), pooler_output=torch.ones(2)))
    again = pytree.tree_unflatten(leaves, decode_tree(encode_tree(spec)))
    assert type(again) is outputs.BaseModelOutputWithPooling
    assert again.hidden_states is None


def test_a_class_that_is_not_there_is_named() -> None:
    module = types.ModuleType("somebody_elses_code")

    @dataclass
    class Output:
        left: int
        right: int

    Output.__module__, Output.__qualname__ = module.__name__, "Output"
    module.Output = Output  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    pytree.register_dataclass(Output)
    try:
        spec = encode_tree(pytree.tree_structure(Output(1, 2)))
        assert pytree.tree_unflatten([3, 4], decode_tree(spec)) == Output(3, 4)
    finally:
        del sys.modules[module.__name__]
    with pytest.raises(ArtefactError, match="import somebody_elses_code"):
        decode_tree(spec)


@pytest.mark.parametrize(
    "data",
    [
        {"type": "collections:namedtuple", "context": "subprocess:Popen", "children": []},
        {"type": "builtins:eval", "context": None, "children": []},
        {"type": "subprocess:Popen", "context": None, "children": []},
        {"type": "antigravity:x", "context": None, "children": []},
        {"type": "builtins:object", "context": None, "children": []},
    ],
)
def test_trees_that_nobody_wrote_are_refused(data: Any) -> None:
    with pytest.raises(ArtefactError):
        decode_tree(data)
    assert "antigravity" not in sys.modules


def _stored(tmp_path: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    store = TensorStore()
    records = json.loads(json.dumps({name: store.add(name, tensor) for name, tensor in tensors.items()}))
    write_safetensors(tmp_path / "weights", store.stored)
    source = TensorSource(read_safetensors(tmp_path / "weights"))
    return {name: source.get(record) for name, record in records.items()}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
    ],
    ids=str,
)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(48, dtype=torch.uint8).view(dtype) if dtype is not torch.bool else torch.tensor([True, False])
    got = _stored(tmp_path, it=tensor, scalar=tensor[:1].reshape(()))
    assert got["it"].dtype == dtype
    assert got["scalar"].shape == ()
    assert got["it"].view(torch.uint8).equal(tensor.view(torch.uint8))


def test_layouts_come_back(tmp_path: Path) -> None:
    image, matrix = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 6).t()
    tensors = {"image": image, "matrix": matrix, "wide": torch.randn(3, 1).expand(3, 4), "empty": torch.empty(0, 3), "slice": torch.randn(9)[2:5]}
    got = _stored(tmp_path, **tensors)
    for name, tensor in tensors.items():
        assert got[name].equal(tensor)
    assert got["image"].stride() == image.stride()
    assert got["matrix"].stride() == matrix.stride()


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(1000, 10))
    got = _stored(tmp_path, embed=weight, head=weight, view=weight.detach())
    assert got["embed"] is got["head"]
    assert isinstance(got["head"], nn.Parameter)
    assert got["view"].data_ptr() == got["head"].data_ptr()
    assert (tmp_path / "weights").stat().st_size < 41_000


def test_our_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.ones(2, dtype=torch.bfloat16), "ü": torch.zeros(0)}
    write_safetensors(tmp_path / "file", tensors)
    theirs = load_file(tmp_path / "file")
    assert all(theirs[name].equal(tensor) for name, tensor in tensors.items())


# --- nothing else comes in ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors", "report.json", "manifest.json", "kernels"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "empty"])
def test_damage_is_named(saved: Path, name: str, harm: str) -> None:
    file = saved / name if name != "kernels" else next((saved / name).glob("*.binary"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-7], "flipped": bytes(content), "empty": b""}[harm])
    with pytest.raises(ArtefactError) as caught:
        artefact.load(saved)
    assert file.name in str(caught.value)


def test_other_files_do_not_matter(lowered: CompiledModel, saved: Path) -> None:
    (saved / "README.txt").write_text("mine")
    (saved / "kernels" / "evil.so").write_bytes(b"\x7fELF")
    x = torch.randn(2, 64)
    torch.testing.assert_close(artefact.load(saved)(x), lowered(x))


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_other_format_versions_are_refused(saved: Path, version: Any) -> None:
    edit_manifest(saved, version=version)
    with pytest.raises(ArtefactError, match="format version"):
        artefact.load(saved)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_files_outside_are_refused(saved: Path, name: str) -> None:
    files = json.loads((saved / "manifest.json").read_text())["files"]
    edit_manifest(saved, files=files | {name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(ArtefactError, match="outside"):
        artefact.load(saved)


@pytest.mark.parametrize("what", ["nothing", "file", "empty", "other"])
def test_what_is_no_artefact_is_refused(tmp_path: Path, what: str) -> None:
    place = tmp_path / "x"
    if what == "file":
        place.write_text("hello")
    elif what != "nothing":
        place.mkdir()
        if what == "other":
            (place / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(ArtefactError):
        artefact.load(place)


FORGED = [
    "os.system",
    "builtins.eval",
    "aten.from_file.default",
    "aten.add_.Tensor",
    "aten.resize_.default",
    "aten.nothing.default",
    "sparsify.nothing.default",
    "prims.add.default",
    "aten.__class__.default",
    "operator.attrgetter",
    "torch.load",
    "aten.linear",
    "sparsify.linear_bsr.default.__globals__",
]


@pytest.mark.parametrize("target", FORGED)
def test_no_other_call_can_be_named(saved: Path, target: str) -> None:
    def forge(graph: dict[str, Any]) -> None:
        next(node for node in graph["regions"][0]["nodes"] if node["op"] == "call_function")["target"] = target

    edit_graph(saved, forge)
    with pytest.raises(ArtefactError):
        artefact.load(saved)
    with pytest.raises(ArtefactError):
        find_op(target)


@pytest.mark.parametrize(
    "edit",
    [
        lambda region: region["nodes"][0].update(op="call_module", target="0"),
        lambda region: region["nodes"][0]["meta"]["val"].update(tensor=[["__import__('os').getcwd()", 1], {"dtype": "float32"}]),
        lambda region: region["nodes"][0]["meta"].update(val={"size": "s0.__class__"}),
        lambda region: region["nodes"].pop(0),
        lambda region: region.pop("spec"),
        lambda region: region["tensors"].popitem(),
        lambda region: next(iter(region["tensors"].values())).update(shape=[1]),
        lambda region: next(iter(region["tensors"].values())).update(key="missing"),
        lambda region: region["spec"].update(outputs={"type": "os:DirEntry", "context": None, "children": []}),
        lambda region: region["nodes"].append("text"),
    ],
)
def test_a_graph_that_nobody_wrote_is_refused(saved: Path, edit: Any) -> None:
    edit_graph(saved, lambda graph: edit(graph["regions"][0]))
    with pytest.raises(ArtefactError):
        artefact.load(saved)


CODE = "open('/tmp/sparsify_was_here', 'w')"


@pytest.mark.parametrize("place", ["node", "argument", "input", "tensor", "keyword"])
def test_no_code_can_hide_in_a_name(saved: Path, place: str) -> None:
    """Graphs become Python text, in fx and in our own executor."""

    def forge(graph: dict[str, Any]) -> None:
        nodes = graph["regions"][0]["nodes"]
        call, tensor = next(n for n in nodes if n["op"] == "call_function"), next(n for n in nodes if n["op"] == "get_attr")
        match place:
            case "node":
                call["name"] = f"x = {CODE}; y"
            case "argument":
                call["kwargs"][f"x={CODE}, y"] = call["kwargs"].pop("x")
            case "input":
                nodes[0]["target"] = f"x={CODE}"
            case "tensor":
                name = f'0", {CODE}, "'
                graph["regions"][0]["tensors"][name] = graph["regions"][0]["tensors"].pop(tensor["target"])
                tensor["target"] = name
            case "keyword":
                call["name"] = "for"

    Path("/tmp/sparsify_was_here").unlink(missing_ok=True)
    edit_graph(saved, forge)
    with pytest.raises(ArtefactError, match="not a name"):
        artefact.load(saved)
    assert not Path("/tmp/sparsify_was_here").exists()


def test_columns_out_of_range_are_refused(saved: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(saved / "weights.safetensors").items()}  # not a map of the file to overwrite
    name = next(name for name in tensors if name.endswith("block_columns"))
    tensors[name][-1] = 30_000
    write_safetensors(saved / "weights.safetensors", tensors)
    reseal(saved)
    with pytest.raises(ArtefactError, match="block_columns"):
        artefact.load(saved)


def _made_elsewhere(saved: Path) -> None:
    target = json.loads((saved / "manifest.json").read_text())["target"]
    arm, x86 = {"arch": "aarch64", "mcpu": "generic", "features": ["neon"]}, {"arch": "x86_64", "mcpu": "x86-64-v3", "features": ["avx2"]}
    other = arm if target["arch"] == "x86_64" else x86
    edit_manifest(saved, target=target | other)


def test_kernels_for_another_machine_are_kept_or_built_again(lowered: CompiledModel, saved: Path) -> None:
    _made_elsewhere(saved)
    x = torch.randn(2, 64)
    for target, arch in (("cpu", host().arch), (None, "aarch64" if host().arch == "x86_64" else "x86_64")):
        loaded = artefact.load(saved, target=target)
        assert loaded.target is not None
        assert loaded.target.arch == arch
        torch.testing.assert_close(loaded(x), lowered(x))


def test_kernels_that_cannot_be_built_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise KernelError("no such instruction")

    monkeypatch.setattr(runtime, "rebind", refuse)
    with pytest.raises(ArtefactError, match="no such instruction"):
        artefact.load(saved)


# --- CompiledModel ------------------------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_for_inference(lowered: CompiledModel) -> None:
    assert not lowered.training
    assert lowered.eval() is lowered
    with pytest.raises(ModelError, match="cannot be trained"):
        lowered.train()
    assert lowered.to("cpu") is lowered
    assert lowered.float() is lowered
    with pytest.raises(ModelError, match="cannot be moved"):
        lowered.half()
    with pytest.raises(ModelError, match="other weights"):
        lowered.load_state_dict(lowered.state_dict())
    with pytest.raises(ModelError, match="cannot be pickled"):
        torch.save(lowered, io.BytesIO())
    with pytest.raises(ModelError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lowered, torch.randn(5, 64))
    with pytest.raises(AttributeError):
        _ = lowered.nothing_of_that_name


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_runs_and_shares_what_never_changes(lowered: CompiledModel, saved: Path, copied: Callable[[Any], Any]) -> None:
    x = torch.randn(5, 64)
    for model in (lowered, artefact.load(saved, mapped=True)):
        made = copied(model)
        assert made is not model
        assert made.model is not model.model
        assert torch.equal(made(x), model(x))
        assert made.resident_bytes() == model.resident_bytes()
        assert made.report().sites == model.report().sites
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(made.state_dict().values(), model.state_dict().values(), strict=True))


def test_kernels_are_called_and_ops_are_traced(lowered: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 64)
    expected = lowered(x)
    traced = torch.compile(lowered, fullgraph=True, backend="eager")
    assert torch.equal(traced(x), expected), "under torch.compile the same kernels run"
    exported = torch.export.export(lowered, (x,), strict=False)
    assert "sparsify.linear_bsr" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), expected)


def test_it_works_in_every_grad_mode(lowered: CompiledModel) -> None:
    x = torch.randn(2, 64)
    with torch.inference_mode():
        one = lowered(x)
    with torch.no_grad():
        two = lowered(x)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_packing_makes_it_smaller(lowered: CompiledModel) -> None:
    assert lowered.resident_bytes() < 4 * 2 * 64 * 96
