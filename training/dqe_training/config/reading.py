"""Presets, YAML files and `section.key=value` overrides. What is checked here is their form; the configuration itself is schema.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import yaml

from dqe_engine.contracts.parsing import parse
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, read_regular

from .schema import TrainConfig


def preset_names() -> list[str]:
    """Names of the presets that ship."""
    return sorted(p.name.removesuffix(".yaml") for p in files("dqe_training.presets").iterdir() if p.name.endswith(".yaml"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: in PyYAML's 1.1, `1e-3` is text and `off` is a boolean."""


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_REPLACED[0], re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _REPLACED[1],
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: a date such as 2024-13-45
        raise InputError(f"{where}: not valid YAML: {' '.join(str(problem).split())}") from problem


def read_source(source: str) -> Any:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = read_regular(path).decode()
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such configuration file") from error
        except OSError as error:
            raise InputError(describe_os_error(error, path)) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    elif source in preset_names():
        text = files("dqe_training.presets").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise InputError(f"{source!r}: no such preset; presets are {', '.join(preset_names())}, or give a .yaml file")
    return _parse_yaml(text, source)


def _override(data: dict[str, Any], assignment: str) -> None:
    key, separator, value = assignment.partition("=")
    if not separator or not key:
        raise InputError(f"override {assignment!r}: expected section.key=value, for example optim.epochs=3")
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise InputError(f"override {assignment!r}: {section!r} is a value, not a section")
    data[last] = _parse_yaml(value, f"override {assignment!r}") if value else ""


def named_in(key: str, data: dict[str, Any], overrides: Sequence[str]) -> str:
    named = data.get(key, "")
    for assignment in overrides:
        if assignment.startswith(f"{key}="):
            named = _parse_yaml(assignment.partition("=")[2], f"override {assignment!r}") or ""
    return named if isinstance(named, str) else ""  # anything else is told by strict parsing


def with_defaults(given: Any, defaults: dict[str, Any]) -> Any:
    """`given` over `defaults`, section by section; what is no section is left to strict parsing."""
    if not isinstance(given, dict):
        return given
    merged = {k: with_defaults(v, defaults[k]) if isinstance(defaults.get(k), dict) else v for k, v in given.items()}
    return defaults | merged


def override(config: TrainConfig, overrides: Sequence[str], *, where: str) -> TrainConfig:
    """`config` with `section.key=value` assignments, all made before the whole is parsed again. Raises InputError."""
    if not overrides:
        return config
    data = msgspec.to_builtins(config)  # so that a section's other keys keep the defaults that it had without the override
    for assignment in overrides:
        _override(data, assignment)
    return parse(TrainConfig, data, where=where)
