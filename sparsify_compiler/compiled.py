"""CompiledModel: what compile() and load() hand back. Called like the model; knows its report and how to save itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .call import instantiate
from .errors import ModelError
from .executor import flat_function, kernel_calls, traced_function
from .inference_only import fix_tensors, inference_only, traced_inference
from .opaque import make_opaque
from .program import Program

if TYPE_CHECKING:
    from .report import Report
    from .resident_experts import ResidentExperts
    from .step import Step
    from .target import Target
    from .whole_call import WholeCall


class CompiledModel(nn.Module):
    """A Program as a module with the model's signature, output structure and dtypes. Inference only: gradients through kernels are an error.

    program  the graphs, in whatever stage they are; nodes with a kernel run it directly, through one registered op under torch.compile, and as
             the portable ops of the graph under torch.export
    target   the machine that the kernels are for; None when there are none
    report   what compile() found out; without one, report() tells the decisions only
    mapped   tensors of the program whose bytes lie in a file, not in memory
    step     the library that takes calls of one token, of a language model
    whole    the library that takes calls of a model that was captured whole
    flat     of a model that was captured whole: tensors of a call -> flat outputs, kernel by kernel
    Attributes that it does not have itself come from the model's own classes, where those are still there (`.config`, `.generate`).
    """

    step: Step | None
    whole: WholeCall | None
    flat: Callable[..., Any]

    def __init__(self, program: Program, target: Target | None = None, report: Report | None = None, mapped: Iterable[Tensor] = (),
                 step: Step | None = None, whole: WholeCall | None = None) -> None:
        super().__init__()
        self.program, self.target = program, target
        self.__dict__["step"], self.__dict__["whole"] = None, whole
        self._report = report
        self.resident_experts: ResidentExperts | None = None  # where load() was given a bound on experts in memory
        self._mapped = frozenset(tensor.untyped_storage().data_ptr() for tensor in mapped)
        self._kernels = tuple(node.meta["kernel"] for _, node in program.nodes() if node.meta.get("kernel") is not None)
        self._bind()
        if step is not None:
            self.decode_by(step)
        super().train(False)

    def decode_by(self, step: Step) -> None:
        """Let a library take the calls of one token that suit it."""
        step.attach(self.model)
        self.__dict__["step"] = step

    def call_by(self, whole: WholeCall) -> None:
        """Let a library take the calls that suit it, of a model that was captured whole."""
        self.__dict__["whole"] = whole
        self._bind()

    def _bind(self) -> None:
        fast = self.program.clone()
        for path, region in fast.regions.items():
            flat = self.__dict__["flat"] = flat_function(region)
            flat = flat if self.whole is None else _whole(self.whole, flat)
            refuses = self.whole is not None or bool(kernel_calls(region.graph)[0])
            make_opaque(region)
            fix_tensors(region.module)
            traced: Callable[..., Any] = partial(traced_function(region), region.module)
            if refuses:
                flat, traced = inference_only(flat, region.module), traced_inference(traced, region.module)
            region.module.forward = _either(self.program.regions[path].module.forward, traced, flat)
        self.model = instantiate(fast)
        # Without hooks on the inner module its __call__ adds nothing but time.
        self.__dict__["_run"] = self.model if self.program.skeleton is not None else self.model.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises InputError where a call does not fit what was captured, ModelError under torch.jit.trace, which does not see kernels."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise ModelError("torch.jit.trace cannot follow our kernels: they are not operators of torch",
                             hint="torch.export.export() takes the portable form; for ONNX call export_onnx()")
        return self._run(*args, **kwargs)

    def report(self) -> Report:
        """What was chosen for each site and why, times, bytes and quality."""
        if self._report is None:
            from .report import Report

            self._report = Report(sites=list(self.program.decisions.values()), left_out=list(self.program.left_out))
        return self._report

    def resident_bytes(self) -> int:
        """Bytes of all tensors that the model holds in memory, what kernels prepared for themselves included; shared ones count once."""
        libraries = [one.library for one in (self.step, self.whole) if one is not None]
        held = [*self.model.parameters(), *self.model.buffers(), *(tensor for library in libraries for tensor in library.own)]
        opaque = 0  # what lies in another library's own layout
        for kernel in self._kernels:
            state = kernel.state()
            held += state.values()
            opaque += 0 if state else kernel.resident_bytes
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return opaque + sum(size for place, size in storages.items() if place not in self._mapped)

    def save(self, path: str | Path) -> None:
        """Write the artefact folder, whole or not at all. Raises StorageError, ArtefactError."""
        from .artefact import save

        save(self, path)

    def export(self, path: str | Path, target: str | Target | None = None, *, cache: bool = False, longest: int = 8192) -> None:
        """Write the model as one library and its weights, which run without PyTorch, from Python, C or C++, on the target: by default this model's.

        cache   a language model with its key-value cache as arguments: functions "prefill" and "decode"
        longest tokens of a text at most, where attention reads some blocks of the keys and the model itself sets no limit

        Raises InputError, ModelError, KernelError, TargetError, StorageError.
        """
        from .export_library import export

        export(self, path, target, cache=cache, longest=longest)

    def export_onnx(self, path: str | Path) -> None:
        """Write the model as one ONNX file, weights dense.

        Raises ModelError where a package is missing or an op has no form in ONNX, StorageError.
        """
        from .export_onnx import export_onnx

        export_onnx(self, path)

    def export_huggingface(self, path: str | Path, like: Any = None) -> None:
        """Write config.json and model.safetensors, which from_pretrained loads; `like` is the model that was compiled, or its folder.

        Raises ModelError where no configuration of its class has such weights, InputError, StorageError.
        """
        from .export_huggingface import export_huggingface

        export_huggingface(self, path, like)

    def train(self, mode: bool = True) -> CompiledModel:
        """Stays in eval mode. Raises ModelError for mode=True."""
        if mode:
            raise ModelError("a compiled model cannot be trained", hint="train the module of a pipeline that stops before pack(), then compile that")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors under the model's own names; a packed weight shows as its format's tensors."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ModelError: kernels have laid out the weights that the model was compiled with."""
        raise ModelError("a compiled model cannot be given other weights", hint="load them into the model and compile that, or load() what was saved")

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A model of its own over the same tensors and kernels, which nothing changes."""
        made = memo[id(self)] = CompiledModel(self.program, self.target, self._report, step=self.step, whole=self.whole)
        made._mapped, made.resident_experts = self._mapped, self.resident_experts
        return made

    def __copy__(self) -> CompiledModel:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError("a compiled model cannot be pickled", hint="save(folder) writes plain files, and load(folder) reads them")

    def extra_repr(self) -> str:
        regions = ", ".join(path or "whole model" for path in self.program.regions)
        return f"stage={self.program.stage}, regions=[{regions}], kernels={len(self._kernels)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        """to(), float(), cuda() and their like: fine where nothing would change; a captured graph holds dtypes and devices of its own."""
        kinds = {(t.dtype, t.device): t for t in [*self.model.parameters(), *self.model.buffers()]}
        if not all(_unchanged(fn, tensor) for tensor in kinds.values()):
            raise ModelError("a compiled model cannot be moved or change its dtype", hint="convert the model first, then compile it")
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("__"):
                raise
            if self.program.skeleton is None and not hasattr(model, name):
                how = "; call it with use_cache=True in the example inputs, and it is compiled in parts, which generate" if name == "generate" else ""
                raise AttributeError(f"no attribute {name!r}: the model was captured whole, as a graph from its inputs to its outputs{how}") from None
            return getattr(model, name)


def _either(portable: Callable[..., Any], traced: Callable[..., Any], flat: Callable[..., Any]) -> Callable[..., Any]:
    """Our flat function; for whoever traces us a graph: the plain one for torch.export, one that calls kernels through an op for torch.compile."""

    def forward(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return flat(*inputs)
        return portable(*inputs) if torch.compiler.is_exporting() else traced(*inputs)

    return forward


def _whole(whole: WholeCall, flat: Callable[..., Any]) -> Callable[..., Any]:
    """The library where it takes a call, else the flat function."""

    def forward(*inputs: Tensor) -> Any:
        found = whole(inputs)
        return flat(*inputs) if found is None else found

    return forward


def _unchanged(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    result = fn(probe)
    return result.dtype == probe.dtype and result.device == probe.device
