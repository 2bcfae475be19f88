"""Results of tuning on disk: which kernels of a layer are worth trying on a machine, how they are cut, and what they took.

A record is one sealed file of the cache (cache.py), by the digest of its key: written whole or not at all, by any number of processes, kept by a
killed one as far as it got, and not written where the disk is full. A key holds for layers of about the same size, with exactly these kernels: their
text and TVM's version are part of it, so a record is never asked for kernels that it did not measure.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sparsify_compiler.codegen import build, cache
from sparsify_compiler.errors import ArtefactError
from sparsify_compiler.target import Target, fingerprint, host

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PREFIX, FORMAT, VERSION = "tuned", "sparsify_compiler tuned results", 1
HALVES = 2      # classes of a size for each doubling of it
FEW = 4         # rows up to which each number is a class
NEAR = 1.1      # a kernel within so much of the best is worth trying on other layers of the class
EAGER = "dense eager"


@dataclass(frozen=True)
class Key:
    """What a record holds for.

    op          the op of the layer: "linear_bsr", "linear", ...
    sizes       outputs, inputs and rows, by classes, and the share that is kept
    structure   numbers of the format: r and c of blocks, n and m
    chain       what follows the layer and kernels may compute: " + add + gelu"
    dtype       of x
    machine     a target by name; this machine by what it is (target.fingerprint)
    features    the target's
    threads     that kernels run on
    tvm, text   version of the compiler, digest of the kernels' text
    """

    op: str
    sizes: tuple[int, int, int, int]
    structure: tuple[tuple[str, int], ...]
    chain: str
    dtype: str
    machine: str
    features: tuple[str, ...]
    threads: int
    tvm: str
    text: str

    @classmethod
    def of(cls, op: str, shape: tuple[int, int], rows: int, density: float, attributes: Mapping[str, Any], chain: str, dtype: str, target: Target,
           threads: int) -> Self:
        """Of a layer with a weight [N, K] on so many rows, on a machine."""
        here = target.runs_on(host())
        kept = round(HALVES * math.log2(density)) if op != "linear" and density > 0 else 0
        sizes = _class(shape[0]), _class(shape[1]), rows if rows <= FEW else FEW + _class(rows), kept
        structure = tuple((name, int(attributes[name])) for name in ("r", "c", "n", "m") if name in attributes)
        return cls(op, sizes, structure, chain, dtype, fingerprint() if here else target.name, target.features, threads, build.version(),
                   build.sources())

    @property
    def shown(self) -> tuple[int, int, int]:
        """Outputs, inputs and rows in the middle of their classes."""
        outputs, inputs, rows, _ = self.sizes
        return _middle(outputs), _middle(inputs), rows if rows <= FEW else _middle(rows - FEW)

    @property
    def name(self) -> str:
        """In the cache."""
        return f"{PREFIX}-{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:40]}"


@dataclass(frozen=True)
class Record:
    """What was measured.

    times    milliseconds of every form, dense ones included, by the names that lowering gives them; those that lost early were timed less often
    dense    which of them compute the whole weight
    options  of a kernel, by its name without what follows it: how it is cut best. Kernels that are not named are as their family offers them
    source   where and when
    """

    key: Key
    times: Mapping[str, float]
    dense: tuple[str, ...]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = ""

    def worth(self, name: str) -> bool:
        """Is this form worth trying? The best of its kind is, and what comes near; a form that was never measured is, too."""
        rivals = [time for other, time in self.times.items() if (other in self.dense) == (name in self.dense)]
        return name not in self.times or name == EAGER or self.times[name] <= NEAR * min(rivals)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the inverse of from_json."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """Raises ArtefactError for anything else."""
        from pydantic import ValidationError

        try:
            return _reader().validate_python(data)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ArtefactError(f"not a tuned result: {where}: {problem['msg']}", where="tuned results", hint="export them again") from error


def find(key: Key) -> Record | None:
    """What is known of such layers."""
    data = cache.read(key.name)
    return None if data is None else Record.from_json(json.loads(data))


def store(record: Record) -> bool:
    """Keep a result, in the place of an older one; whether it was kept. Where it was not, cache.warnings() says why."""
    return cache.write(record.key.name, json.dumps(record.to_json()).encode())


def records() -> Iterator[Record]:
    """Everything that is known, of kernels as they were at any time."""
    for key in cache.keys(PREFIX):
        data = cache.read(key)
        if data is not None:
            yield Record.from_json(json.loads(data))


def export(path: Path) -> int:
    """Write all of it as one JSON file, for another machine or colleague; how many records. Raises OSError."""
    found = [record.to_json() for record in records()]
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION, "records": found}, indent=1) + "\n", encoding="utf-8")
    return len(found)


def read_export(path: Path) -> list[Record]:
    """The records of such a file. Raises ArtefactError for one that is missing, damaged or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"cannot be read: {error}", where=str(path), hint="give a file that `sparsify tune --export` wrote") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION or not isinstance(data.get("records"), list):
        raise ArtefactError("no tuned results of this version", where=str(path), hint="give a file that `sparsify tune --export` wrote")
    return [Record.from_json(record) for record in data["records"]]


@functools.cache
def _reader() -> TypeAdapter[Record]:
    """Made once: that takes many times as long as reading a record."""
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _middle(number: int) -> int:
    return round(2 ** (number / HALVES))


def _class(size: int) -> int:
    return round(HALVES * math.log2(max(size, 1)))
