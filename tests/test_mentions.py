"""A published method is found by its name, whatever holds it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sparsify_compiler.cli import app
from sparsify_compiler.mentions import mentions

METHODS = {  # of sparse weights, of training and fine-tuning with them, of sparse activations, and of kernels on a CPU
    "AP": "activate_while_pruning", "APP": "app", "AST": "ast", "BDWP": "bdwp", "CATS": "cats", "CFSP": "cfsp", "CHESS": "chess",
    "CoreInfer": "core_infer", "DaSS": "dass", "DEFT": "deft", "Deja Vu": "deja_vu", "Delta Activation Layer": "delta_activations", "DSEE": "dsee",
    "DSnoT": "dsnot", "Efficient Sparse Inference Software Accelerator": "constant_block", "Essential Sparsity": "essential_sparsity",
    "Fast Sparse ConvNets": "gmp", "FFSplit": "ffsplit", "FTWT": "ftwt", "G2GNet": "g2gnet", "Gradual Magnitude Pruning": "gmp", "GraNet": "granet",
    "HyperSparse": "hyper_sparse", "iCBS": "icbs", "IST": "LayerChoice", "Lazy Neuron": "lazy_neuron", "LeMo": "lemo", "LLaVA-MoLE": "llava_mole",
    "Lottery Jackpots": "lottery_jackpots", "MaskLLM": "mask_llm", "MediSwift": "spdf", "Nerva": "nerva", "PAT": "pat",
    "PreCropping": "precropping", "Progressive Gradient Flow": "progressive_gradient_flow", "ProSparse": "prosparse", "Prune OFA": "prune_ofa",
    "PST": "pst", "Q-Sparse": "q_sparse", "R-Sparse": "r_sparse", "Random Pruning": "random_pruning", "ReLU^2 Wins": "relu2_wins",
    "Rethinking Sparse Optimization": "gmp", "S2FT": "s2ft", "Scaling Sparse Fine-Tuning": "sft",
    "Semi-structured activation sparsity": "sparse_places", "ShadowLLM": "shadowllm", "Sirius": "sirius", "SliceGPT": "slicegpt",
    "SLTrain": "sltrain", "SMoRA": "smora", "SMT": "smt", "Spark Transformer": "spark", "Sparse Llama": "sparsegpt",
    "Sparse Model Soups": "average", "Sparse Momentum": "sparse_momentum", "Sparse-IFT": "sparse_ift", "Sparse-MeZO": "ZerothOrder",
    "SparseAdapter": "sparse_adapter", "SparseByteNN": "gmp", "SparseGPT": "sparsegpt", "SparseLLM": "sparsellm", "SparseProp": "sparseprop",
    "Sparsing Law": "sparsing_law", "SPDF": "spdf", "SPP": "spp", "SPT": "spt", "SQFT": "sqft", "SquareHead": "squarehead", "SRigL": "srigl",
    "SWAMP": "averaged_cycles", "TEAL": "teal", "The Journey Matters": "journey_matters", "Turbo Sparse": "turbo_sparse", "WaveRNN": "gmp",
    "WGSEF": "wgsef", "WINA": "wina",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_found_by_its_name(method: str) -> None:
    assert METHODS[method] in [one.name for one in mentions(method)]


def test_what_is_called_so_comes_first_and_recipes_before_all_else() -> None:
    assert [(one.kind, one.name) for one in mentions("CFSP")][:2] == [("recipe", "cfsp"), ("budget", "cfsp")]
    kinds = [one.kind for one in mentions("SRigL")]
    assert kinds[0] == "recipe"
    assert {"recipe", "pass", "sc"} <= set(kinds)


def test_spelling_does_not_matter_but_short_names_are_words() -> None:
    assert [one.name for one in mentions("2402.15751")] == [one.name for one in mentions("sparse mezo")] == ["ZerothOrder"]
    assert [one.name for one in mentions("IST")] == ["LayerChoice"], "and not whatever exists"
    assert mentions("ist") == []
    assert mentions("AST")[0].name == mentions("ast")[0].name == "ast", "a name of ours is found in any case"
    assert mentions(" - ") == []


def test_the_command_lists_what_is_found_or_says_where_all_is() -> None:
    run = CliRunner().invoke(app, ["recipes", "sparse", "mezo"])
    assert run.exit_code == 0
    assert "ZerothOrder" in run.output
    assert "wanda" not in run.output
    assert "nothing here speaks of 'no such thing'" in CliRunner().invoke(app, ["recipes", "no", "such", "thing"]).output
    assert "wanda" in CliRunner().invoke(app, ["recipes"]).output
