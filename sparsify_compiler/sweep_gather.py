"""What a sweep gathers of the inputs of linears, convolutions and batch norms, summed over batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import unfold

from .errors import CalibrationError
from .normal_form_edit import argument, aten, is_call, only_user, same_shape, shape
from .statistic import STATISTICS

# Of a layer's rows: what its weight, seen as [out, K], is multiplied with. A convolution's rows are the patches that it reads, K = in * kh * kw.
#   patch_gram  float32 [K, K]: X^T X, summed over the rows; of a linear it is the statistic gram
#   patch_mean  float32 [K]: the mean row
#   patch_norm  float32 [K]: L2 norm of each column of X
#   patch_rows  int64 []: number of rows
#   cross       float32 [K, K]: D^T X, where D are the rows that the dense model has in the place of X. Needs a sweep with dense=True
#   residual    float32 [out, K]: R^T X, where R is by how much the stream that the layer's output is added to is short of what it is in the dense
#               model; [0, K] where the output is not added to anything. Needs a sweep with dense=True
#   rows        float32 [rows, K]: all of them
OWN = ("patch_gram", "patch_mean", "patch_norm", "patch_rows", "cross", "residual", "rows")
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
_Values = Mapping[fx.Node, Any]


def patches_of(op: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """What makes rows [rows, K] out of the op's input; None for a convolution in groups or in three dimensions."""
    if is_call(op, aten.linear.default):
        return lambda x: x.reshape(-1, x.shape[-1])
    if not is_call(op, *_CONVOLUTIONS) or argument(op, "groups") != 1 or isinstance(argument(op, "padding"), str):
        return None
    sizes = shape(op.kwargs["weight"])
    if sizes is None:
        return None
    given = (sizes[2:], *(argument(op, name) for name in ("stride", "padding", "dilation")))
    kernel, stride, padding, dilation = (list(map(int, value)) for value in given)
    flat = len(kernel) == 1  # a convolution over one dimension is one over two of which the first has size 1
    if flat:
        kernel, stride, padding, dilation = [1, *kernel], [1, *stride], [0, *padding], [1, *dilation]
    pair = [(both[0], both[1]) for both in (kernel, dilation, padding, stride)]

    def rows(x: Tensor) -> Tensor:
        image = x.unsqueeze(-2) if flat else x
        image = image if image.dim() == 4 else image.unsqueeze(0)
        found = unfold(image, *pair)
        return found.transpose(1, 2).reshape(-1, found.shape[1])

    return rows


def skip_of(op: fx.Node) -> fx.Node | None:
    """The residual stream that the op's output, and nothing else of it, is added to."""
    add = only_user(op)
    if add is None or not is_call(add, aten.add.Tensor) or argument(add, "alpha") != 1:
        return None
    others = [value for value in (add.kwargs["self"], add.kwargs["other"]) if value is not op]
    skip = others[0] if len(others) == 1 else None
    return skip if isinstance(skip, fx.Node) and skip.op != "get_attr" and same_shape(shape(skip), shape(op)) else None


class Gathering:
    """The sums of one stop. Ops that read the same value share what is the same for both."""

    def __init__(self, wanted: Mapping[fx.Node, Collection[str]]) -> None:
        self._wanted = wanted
        self._sums: dict[Any, Tensor] = {}
        self._rows: dict[Any, int] = {}
        self._seen: set[Any] = set()

    def begin(self) -> None:
        """A new batch comes."""
        self._seen.clear()

    def add(self, op: fx.Node, values: _Values, dense: _Values | None) -> None:
        """Add what `op` reads in the batch. Raises CalibrationError where it is not finite."""
        ours = [name for name in self._wanted[op] if name in OWN and self._fresh(op, name)]
        others = [name for name in self._wanted[op] if name not in OWN and self._fresh(op, name)]
        source = op.kwargs["input"]
        assert isinstance(source, fx.Node)
        if others:
            channel = -1 if is_call(op, aten.linear.default) else _channel(op)
            rows = _checked(values[source].movedim(channel, -1), op)
            for name in others:
                key = _key(op, name)
                total = self._sums.setdefault(key, STATISTICS[name].start(rows.shape[1]))
                STATISTICS[name].add(total, rows)
                self._rows[key] = self._rows.get(key, 0) + rows.shape[0]
        if ours:
            self._add_own(op, ours, values, dense)

    def results(self) -> dict[fx.Node, dict[str, Tensor]]:
        """The statistics by op and name."""
        found: dict[fx.Node, dict[str, Tensor]] = {op: {} for op in self._wanted}
        for op, names in self._wanted.items():
            for name in names:
                key = _key(op, name)
                if key not in self._sums:
                    continue  # no row came by: whoever needs it says so
                if name in STATISTICS:
                    found[op][name] = STATISTICS[name].finish(self._sums[key], self._rows[key])
                else:
                    found[op][name] = _finished(name, self._sums[key], self._rows[key])
        return found

    def _fresh(self, op: fx.Node, name: str) -> bool:
        """True the first time in a batch."""
        key = _key(op, name)
        fresh = key not in self._seen
        self._seen.add(key)
        return fresh

    def _add_own(self, op: fx.Node, names: list[str], values: _Values, dense: _Values | None) -> None:
        make = patches_of(op)
        if make is None:
            raise CalibrationError("rows of this convolution cannot be gathered", where=op.name)
        source = op.kwargs["input"]
        rows = _checked(make(values[source]), op)  # type: ignore[index]
        for name in names:
            key = _key(op, name)
            self._rows[key] = self._rows.get(key, 0) + rows.shape[0]
            if name == "patch_mean":
                found = rows.sum(0, dtype=torch.float64)
            elif name == "patch_norm":
                found = rows.square().sum(0, dtype=torch.float64)
            elif name == "patch_rows":
                found = torch.tensor(rows.shape[0])
            elif name == "patch_gram":
                found = rows.T @ rows
            elif name == "rows":
                self._sums[key] = torch.cat([self._sums[key], rows]) if key in self._sums else rows.clone()
                continue
            elif dense is None:
                raise CalibrationError(f"the statistic {name} compares with the dense model, which runs beside a sweep only", where=op.name,
                                       hint="say inputs='pruned'")
            elif name == "cross":
                found = _float(make(dense[source])).T @ rows  # type: ignore[index]
            else:
                found = _shortfall(op, values, dense, rows)
            if key in self._sums:
                self._sums[key] += found
            else:
                self._sums[key] = found


def _channel(op: fx.Node) -> int:
    """The dimension of the input's channels, from the end: of a convolution's image, batched or not; of a batch_norm's the second."""
    like = op.kwargs["input" if is_call(op, aten.batch_norm.default) else "weight"]
    return 1 - len(shape(like) or ())


def _shortfall(op: fx.Node, values: _Values, dense: _Values, rows: Tensor) -> Tensor:
    skip = skip_of(op)
    if skip is None or skip not in values or skip not in dense:
        return rows.new_zeros(0, rows.shape[1])
    short = _float(dense[skip]) - _float(values[skip])
    if not is_call(op, aten.linear.default):
        short = short.movedim(1 - op.kwargs["weight"].meta["val"].dim(), -1)  # type: ignore[union-attr]
    return short.reshape(-1, short.shape[-1]).T @ rows


def _finished(name: str, total: Tensor, rows: int) -> Tensor:
    if name == "patch_mean":
        return (total / max(rows, 1)).float()
    return total.sqrt().float() if name == "patch_norm" else total


def _key(op: fx.Node, name: str) -> Any:
    """Equal for ops of which the statistic is the same."""
    if name == "residual":
        return op, name
    if name in OWN and not is_call(op, aten.linear.default):
        return op, name
    return op.kwargs["input"], name


def _checked(x: Tensor, op: fx.Node) -> Tensor:
    rows = _float(x.reshape(-1, x.shape[-1]))
    if not bool(rows.sum(dtype=torch.float64).isfinite()):
        raise CalibrationError("the input of this layer is NaN or infinite on a calibration batch", where=str(op.meta.get("path") or op.name),
                               hint="check the batches, and that the model runs in a dtype that holds its activations")
    return rows


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
