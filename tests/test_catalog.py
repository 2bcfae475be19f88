"""The file tree is the registry."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_compiler import catalog, recipes
from sparsify_compiler.errors import SparsifyError, UnknownNameError


def test_names_are_files() -> None:
    assert "fold_batchnorm" in catalog.names("pass")
    assert list(catalog.names("pass")) == sorted(catalog.names("pass"))
    assert not any(name.startswith("_") for kind in catalog.KINDS for name in catalog.names(kind))
    assert not set(catalog.names("pass")) & set(catalog.names("structure")), "structures lie deeper than passes"


def test_get_ignores_case_and_underscores() -> None:
    assert catalog.get("pass", "fold_batchnorm").__name__ == "FoldBatchnorm"
    assert catalog.get("structure", "nm").__name__ == "NM"


def test_ops_and_kernels_are_modules() -> None:
    assert catalog.get("op", "linear_csr").__name__ == "sparsify_compiler.ops.linear_csr"
    assert catalog.get("kernel", "linear_csr").__name__ == "sparsify_compiler.codegen.kernels.linear_csr"


def test_kernels_are_named_like_ops_and_what_they_share_is_no_kernel() -> None:
    formats = {name for name in catalog.names("op") if name.startswith("linear_")}  # a convolution takes the groups of its format's linear
    assert set(catalog.names("kernel")) == formats | {"linear", "conv2d", "select_linear", "select_ffn", "select_inputs_ffn", "predicted_ffn",
                                                      "experts_ffn", "top_pages"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[1] / "codegen" / "kernels").glob("*.py")))
def test_every_file_of_kernels_can_be_imported(name: str) -> None:
    """Families are loaded by name: a file that nothing loads could say what is not so."""
    importlib.import_module(f"sparsify_compiler.codegen.kernels.{name}")


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown pass 'fold_batchnrom'[\s\S]*fold_batchnorm"):
        catalog.get("pass", "fold_batchnrom")
    with pytest.raises(UnknownNameError, match=r"unknown kind of entry 'passes'[\s\S]*pass"):
        catalog.names("passes")
    with pytest.raises(UnknownNameError, match="nm"):
        catalog.find(("structure",), "NNM")


def test_describe_reads_without_importing() -> None:
    code = ("import sys; from sparsify_compiler import catalog; d = catalog.describe('pass', 'merge_conv_branches'); "
            "assert not any('merge_conv' in m for m in sys.modules); print(d.fields['Paper'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "arXiv:2101.03697" in done.stdout


def test_read_fields_takes_indented_lines_along() -> None:
    fields = catalog.read_fields("Fold.\n\nMatches    a(b)\n           and c\nPreserves  values\nother text\nPaper      none: reason\n")
    assert fields == {"Matches": "a(b)\nand c", "Preserves": "values", "Paper": "none: reason"}


def test_plug_in_adds_entries(plugins) -> None:
    plugins()
    assert "every_option" in catalog.names("pass")
    assert "fold_batchnorm" in catalog.names("pass")
    assert catalog.get("structure", "grid").__module__ == "sample_plugin.passes.prune.structures.grid"
    assert catalog.find(("structure",), "Grid") is catalog.get("structure", "grid")


def test_a_name_used_twice_is_an_error(plugins, tmp_path: Path) -> None:
    folder = tmp_path / "clash_plugin" / "passes" / "other"
    folder.mkdir(parents=True)
    (folder / "fold_batchnorm.py").write_text("")
    plugins(tmp_path, "clash_plugin")
    with pytest.raises(SparsifyError, match="'fold_batchnorm' is defined twice"):
        catalog.names("pass")
    assert catalog.names("structure"), "other kinds still work"


def test_a_file_must_hold_what_its_name_says(plugins, tmp_path: Path) -> None:
    folder = tmp_path / "hollow_plugin" / "passes" / "other"
    folder.mkdir(parents=True)
    (folder / "promised.py").write_text("from pathlib import Path as Promised\n")  # imported, not defined there
    plugins(tmp_path, "hollow_plugin")
    with pytest.raises(SparsifyError, match="holds nothing named 'promised'"):
        catalog.get("pass", "promised")


def test_a_plug_in_must_be_a_package(plugins, tmp_path: Path) -> None:
    plugins(tmp_path, "no_such_plugin")
    with pytest.raises(SparsifyError, match="is not a package"):
        catalog.names("pass")


def test_recipes_are_attributes(plugins) -> None:
    plugins()
    assert recipes.twice is catalog.get("recipe", "twice")
    assert "twice" in dir(recipes)
    assert not hasattr(recipes, "twiec")
    with pytest.raises(UnknownNameError, match="twice"):
        _ = recipes.twiec
