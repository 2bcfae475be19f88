"""Targets as data: each named one is whole, bad ones are refused with what is near, and the compilers know what they are asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
from typing import Any

import pytest

from sparsify_compiler import machines
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.targets import options, tvm_target
from sparsify_compiler.codegen.targets.llvm import UNUSED
from sparsify_compiler.cost_models import machine as sheets
from sparsify_compiler.errors import KernelError, TargetError
from sparsify_compiler.target import FEATURES, HERE, NAMES, PROCESSORS, Target, host, resolve, second_cache, title

NAMED = [name for name in NAMES if name not in HERE]
ALIASES = {"apple-m1", "apple-m2", "apple-m3"}  # LLVM takes these names and does not list them


@pytest.mark.parametrize("name", NAMED)
def test_every_named_target_is_whole(name: str) -> None:
    target = resolve(name)
    assert target.name == name
    assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target
    assert set(target.features) <= set(FEATURES[target.arch])
    assert title(target) != title(dataclasses.replace(target, name="my board"))
    made = tvm_target(target)
    assert str(made.kind) == ("cuda" if target.arch == "cuda" else "llvm")
    assert (target.arch == "cuda") == ("arch" in options(target))


def test_the_names_that_the_other_parts_count_on() -> None:
    assert {"cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "neoverse-v2", "apple-m1", "aarch64", "x86-avx2", "x86-avx512",
            "x86-vnni-bf16", "x86-amx", "sm_80", "sm_90"} == set(NAMED)
    levels = [set(resolve(name).features) for name in ("x86-avx2", "x86-avx512", "x86-vnni-bf16", "x86-amx")]
    assert all(less < more for less, more in itertools.pairwise(levels))
    assert (resolve("cortex-a76").vector_bytes, resolve("cortex-a76").vector_registers) == (16, 32)
    assert (resolve("x86-avx2").vector_bytes, resolve("x86-avx2").vector_registers) == (32, 16)
    assert (resolve("x86-amx").vector_bytes, resolve("x86-amx").vector_registers) == (64, 32)
    assert dataclasses.replace(resolve("x86-avx2"), features=()).vector_bytes == 16


def test_the_host_has_no_feature_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a virtual machine hides some of them."""
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    told = {"neon": True, "dotprod": True, "fullfp16": False, "sve": True, "sve2": True}
    monkeypatch.setattr("sparsify_compiler.target.aarch64_features", lambda: told)
    assert (host.__wrapped__().arch, host.__wrapped__().features) == ("aarch64", ("dotprod", "neon"))


@pytest.mark.parametrize("name", [name for name in NAMED if resolve(name).arch == "x86_64"])
def test_the_host_is_tuned_for_as_the_target_of_its_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm

    target = resolve(name)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(tvm, "get_global_func", lambda _: lambda: dict.fromkeys(target.features, 1))
    assert (host.__wrapped__().mcpu, host.__wrapped__().features) == (target.mcpu, target.features)
    assert target.cores == os.cpu_count()


@pytest.mark.parametrize(("told", "found"), [(1 << 20, 1 << 20), (0, 2 << 20), (-1, 2 << 20)])
def test_a_second_cache_that_nobody_tells_of_is_taken_to_be_2_mib(told: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf_names", {"SC_LEVEL2_CACHE_SIZE": 0})
    monkeypatch.setattr(os, "sysconf", lambda name: told)
    assert second_cache.__wrapped__(host()) == found
    assert second_cache.__wrapped__(resolve("x86-avx512")) == 2 << 20     # another machine's is not this one's
    monkeypatch.setattr(os, "sysconf_names", {})                          # Windows
    assert second_cache.__wrapped__(host()) == 2 << 20


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_llvm_knows_every_processor(arch: str) -> None:
    import tvm

    listed = tvm.get_global_func("target.llvm_get_cpu_archlist")(tvm_target(resolve("x86-avx2" if arch == "x86_64" else "aarch64")))
    assert set(PROCESSORS[arch]) - set(map(str, listed)) <= ALIASES


@pytest.mark.parametrize("name", [name for name in NAMED if resolve(name).arch == "aarch64"])
def test_processors_have_the_features_that_targets_give_them(name: str) -> None:
    """By LLVM's own tables; M1's are those of the A14."""
    import tvm

    target, about = resolve(name), tvm.get_global_func("target.llvm_get_cpu_features")
    plain = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-unknown-linux-gnu", "mcpu": target.mcpu})
    assert {feature for feature in FEATURES["aarch64"] if feature in about(plain)} == set(target.features)
    assert {feature for feature in FEATURES["aarch64"] if feature in about(tvm_target(target))} == set(target.features) - set(UNUSED)


@pytest.mark.parametrize(("name", "level"), [("x86-avx2", {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}),
                                            ("x86-avx512", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})])
def test_code_for_x86_has_all_instructions_of_its_level(name: str, level: set[str]) -> None:
    """x86-64-v3, and what v4 has more: System V ABI, AMD64 supplement, section 3.1.1."""
    import tvm

    assert level <= set(map(str, tvm.get_global_func("target.llvm_get_cpu_features")(tvm_target(resolve(name)))))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"arch": "riscv64"}, r"unknown architecture 'riscv64'\n  did you mean aarch64"),
    ({"arch": "aarch"}, r"unknown architecture 'aarch'\n  did you mean aarch64"),
    ({"mcpu": "cortex-a67"}, r"unknown processor 'cortex-a67' of aarch64\n  did you mean .*cortex-a76"),
    ({"features": ("neon", "dotprd")}, r"unknown feature 'dotprd' of aarch64\n  did you mean dotprod"),
    ({"features": ("avx2",)}, r"unknown feature 'avx2' of aarch64"),
    ({"features": ("dotprod", "neon", "sve2")}, r"no machine has sve2 without sve\n  add 'sve'"),
    ({"cores": 0}, r"at least one core, got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_targets_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        dataclasses.replace(resolve("cortex-a76"), **change)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'cortex-a75'\n  did you mean cortex-a76.*known: cpu, native, x86-avx2"):
        resolve("cortex-a75")
    with pytest.raises(TargetError, match="sm_90"):
        resolve("sm90")


@pytest.mark.parametrize("name", NAMED)
def test_code_of_another_machine_is_refused_before_it_is_built(name: str) -> None:
    target, here = resolve(name), host()
    runs = target.arch == here.arch and set(target.features) <= set(here.features)
    assert target.runs_on(here) == runs
    if not runs:
        with pytest.raises(KernelError, match="this machine"):
            build.load(_Unbuildable(), target)


@dataclasses.dataclass(frozen=True)
class _Unbuildable:
    name = "unbuildable"

    def compute(self) -> Any:
        raise AssertionError("it was compiled")


def test_machine_code_depends_on_the_processor_of_arm_and_on_the_features_of_x86() -> None:
    kernel, arm, x86 = _Unbuildable(), resolve("cortex-a76"), resolve("x86-avx2")
    assert build.key(kernel, arm) != build.key(kernel, resolve("neoverse-n1"))
    assert build.key(kernel, x86) == build.key(kernel, dataclasses.replace(x86, mcpu="znver3"))
    assert build.key(kernel, x86) != build.key(kernel, resolve("x86-avx512"))


@pytest.mark.parametrize("name", [name for name in NAMED if resolve(name).arch != "x86_64"])
def test_every_processor_has_a_data_sheet(name: str) -> None:
    made, own = machines.nearest_machine(resolve(name))
    assert own is (name != "aarch64")
    assert made.features == resolve(name).features


def test_a_machine_of_the_cost_model_takes_its_facts_from_its_target() -> None:
    for name in sheets.names():
        made, text = sheets.known(name), json.loads((sheets.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        target = resolve(text["target"])
        assert not {"arch", "features", "cores"} & set(text)
        assert (made.arch, made.features, made.cores) == (target.arch, target.features, target.cores)
    assert machines.machine("sm_90").name == "h100"
    assert machines.machine(resolve("neoverse-v2")).name == "neoverse-v2"
    assert "sve" not in machines.machine(dataclasses.replace(resolve("neoverse-v2"), features=("neon",))).features
    with pytest.raises(TargetError, match=r"nothing is known of the speed of aarch64\n  known: .*cortex-a76"):
        machines.machine("aarch64")
