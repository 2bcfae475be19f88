"""A compiler for sparsity in PyTorch: capture, rewrite, choose, lower; never slower than dense.

    import sparsify_compiler as sc
    compiled = sc.compile(model, example_inputs, recipe="wanda", target="cpu", budget=sc.Budget(density=0.5), calibration=batches)
    print(compiled.report())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Bound here and now: importing the submodules later would put the modules in the functions' places.
from .capture import capture
from .compile import compile
from .version import __version__

if TYPE_CHECKING:
    from . import errors, recipes
    from .artefact import export_dense, load
    from .averaging import average, averaged_cycles, soup
    from .budget import Budget
    from .compiled import CompiledModel
    from .correct import generate_corrected
    from .estimates import estimate
    from .finalize import finalize
    from .layer_choice import LayerChoice
    from .library_cache_encoded import low_rank_cache, quantized_cache
    from .library_cache_evicting import evicting_cache
    from .library_cache_mixed import mixed_cache
    from .library_cache_streaming import streaming_cache
    from .movement import Movement
    from .passes_api import Miss, Pass, Preserves
    from .pipeline import Pipeline
    from .program import Program, Stage
    from .recover import recover
    from .reparameterize import reparameterize
    from .report import Report
    from .rule import Match, Rule, RulePass
    from .sites import find_sites
    from .target import Target
    from .training_attach import attach
    from .training_callbacks import lightning_callback, trainer_callback
    from .tuning import export_tuned, import_tuned, tune
    from .zeroth_order import ZerothOrder

# name -> module that holds it; imported when it is first asked for.
_LAZY = {
    "Budget": "budget", "CompiledModel": "compiled", "Match": "rule", "Miss": "passes_api", "Movement": "movement",
    "Pass": "passes_api", "Pipeline": "pipeline",
    "Preserves": "passes_api", "Program": "program", "Report": "report", "Rule": "rule", "RulePass": "rule", "Stage": "program",
    "Target": "target", "attach": "training_attach", "errors": "", "estimate": "estimates", "evicting_cache": "library_cache_evicting",
    "export_dense": "artefact", "generate_corrected": "correct", "find_sites": "sites", "load": "artefact", "low_rank_cache": "library_cache_encoded",
    "quantized_cache": "library_cache_encoded", "streaming_cache": "library_cache_streaming", "mixed_cache": "library_cache_mixed",
    "recipes": "", "recover": "recover",
    "reparameterize": "reparameterize", "lightning_callback": "training_callbacks", "trainer_callback": "training_callbacks",
    "export_tuned": "tuning", "import_tuned": "tuning", "tune": "tuning", "average": "averaging", "averaged_cycles": "averaging", "soup": "averaging",
    "finalize": "finalize", "ZerothOrder": "zeroth_order", "LayerChoice": "layer_choice",
}

__all__ = ["Budget", "CompiledModel", "LayerChoice", "Match", "Miss", "Movement", "Pass", "Pipeline", "Preserves", "Program", "Report", "Rule",
           "RulePass", "Stage", "Target", "ZerothOrder", "__version__", "attach", "average", "averaged_cycles", "capture", "compile", "errors",
           "estimate", "evicting_cache", "export_dense", "export_tuned", "finalize", "find_sites", "generate_corrected", "import_tuned",
           "lightning_callback", "load", "low_rank_cache", "mixed_cache", "quantized_cache", "recipes", "recover", "reparameterize", "soup",
           "streaming_cache", "trainer_callback", "tune"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    holder = importlib.import_module(f".{_LAZY[name] or name}", __name__)
    value = getattr(holder, name) if _LAZY[name] else holder
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
