"""A pipeline as YAML and back. A list of passes under the key `pipeline`; a dataclass value carries its class as a tag:

    pipeline:
      - fold_batchnorm
      - mask_weights:
          score: weight_times_input_norm
          structure: !NM {n: 2, m: 4}        # or the text NM(n=2, m=4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from .errors import ParseError
from .passes_api import Pass
from .pipeline_text import build, build_step, named_value


def to_yaml(passes: tuple[Pass, ...]) -> str:
    """YAML text that from_yaml() reads back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, value: Any) -> yaml.Node:
        if isinstance(value, Enum):
            return dumper.represent_data(value.value)
        if is_dataclass(value):
            return dumper.represent_mapping(f"!{type(value).__name__}", {f.name: getattr(value, f.name) for f in fields(value) if f.init})
        raise ParseError(f"{value!r} is not a plain value")

    Dumper.add_representer(str, _text)
    Dumper.add_multi_representer(object, represent)
    Dumper.add_multi_representer(str, _text)
    Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))
    steps = [{p.name(): options} if (options := p.options()) else p.name() for p in passes]
    return yaml.dump({"pipeline": steps}, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _text(dumper: Any, value: str) -> Any:
    """Text; in quotes with escapes where a line break of some kind would be folded into a space."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=None if value.isprintable() else '"')


def from_yaml(text: str, where: str = "YAML") -> tuple[Pass, ...]:
    """The passes that the text lists. Raises ParseError with line and column, UnknownNameError."""
    data = _load(text, where)
    steps = data.get("pipeline") if isinstance(data, Mapping) else data
    if not isinstance(steps, list) or (isinstance(data, Mapping) and len(data) != 1):
        raise ParseError("a pipeline is a list of passes under the key 'pipeline'", where=where)
    return tuple(p for index, step in enumerate(steps) for p in _step(step, f"{where}, pass {index + 1}"))


def _step(step: Any, where: str) -> tuple[Pass, ...]:
    if isinstance(step, str):
        return build_step(step, {})
    if isinstance(step, Mapping) and len(step) == 1:
        name, options = next(iter(step.items()))
        if isinstance(name, str) and (options is None or (isinstance(options, Mapping) and all(isinstance(k, str) for k in options))):
            return build_step(name, options or {})
    raise ParseError(f"not a pass: {step!r}", where=where, hint="write `- name` or `- name: {option: value}`")


def _load(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def construct(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
        mark = f"{where}, line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
        if not isinstance(node, yaml.MappingNode):
            raise ParseError(f"!{suffix} needs its options as a mapping", where=mark)
        options = {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}
        return build(named_value(suffix), options, suffix, lambda option: f" at {mark}")

    Loader.add_multi_constructor("!", construct)
    try:
        # A SafeLoader with nothing added but dataclasses of the catalogue: no object is built that the file names by itself.
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ParseError(f"not YAML: {getattr(error, 'problem', None) or error}", where=place) from error
