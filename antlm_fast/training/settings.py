"""Settings as text: `--set a.b=c`, TOML and JSON files and a run's config.json, checked against the dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antlm_fast.training.config import TrainConfig
from antlm_fast.types import InputError
from antlm_fast.user_text import read_text

VOCABULARY_RULE = "model.vocab_size must be left to the tokenizer (set tokenizer.vocab_size)"


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values; `from_dict` reads it back equal."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], *, start: TrainConfig | None = None) -> TrainConfig:
    """A config from nested values.

    Args:
        start: what is not given is taken from it; None takes the dataclasses' defaults.

    Raises:
        InputError: an unknown name (with the nearest ones), a wrong type, or a value its component refuses.
    """
    return _Reader(values, start).build(TrainConfig, values, start, prefix="")


def apply_settings(config: TrainConfig, settings: list[str], *, train: str | None = None) -> TrainConfig:
    """Apply `a.b=c` texts, all at once, so that settings which depend on each other may come in any order.

    Values are read by the field's type: numbers, true/false, none, text, or a comma-separated list.

    Args:
        train: data.train as it stands: a folder may be called none, or end in a blank. A setting of it comes after it.
    """
    nested: dict[str, Any] = {} if train is None else {"data": {"train": train}}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InputError(f"--set must be name=value, such as optimizer.lr=1e-3; got {setting!r}")
        if name == "model.vocab_size":
            raise InputError(f"{VOCABULARY_RULE}; got {setting!r}")
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InputError(f"--set must not give both {part!r} and a field of it; got {setting!r}")
        place[last] = _Text(text.strip())
    return from_dict(nested, start=config)


def read_config_file(path: Path, *, start: TrainConfig | None = None) -> TrainConfig:
    """A .toml or .json file of settings, or the config.json of a run (whose vocabulary size is derived again)."""
    try:
        text = read_text(path, "config file")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"config file {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold a table of settings; got {type(values).__name__}")
    if "versions" in values and "config" in values:
        values = values["config"]
        values.get("model", {}).pop("vocab_size", None)
    if isinstance(values.get("model"), dict) and "vocab_size" in values["model"]:
        raise InputError(f"config file {path}: {VOCABULARY_RULE}; got {values['model']['vocab_size']}")
    try:
        return from_dict(values, start=start)
    except InputError as error:
        raise InputError(f"config file {path}: {error}") from None


class _Text(str):
    """A value that still has to be read by its field's type."""


class _Reader:
    """Builds the dataclasses; knows which class was chosen where there are several, so that names can be suggested.

    Args:
        values: all settings, nested.
        start: what is not given is taken from it.
    """

    def __init__(self, values: Mapping[str, Any], start: TrainConfig | None) -> None:
        self._known = _all_names(TrainConfig, values, start, "")

    def build(self, cls: type[Any], values: Any, start: Any, prefix: str) -> Any:
        if not isinstance(values, Mapping):
            raise InputError(f"{prefix.rstrip('.')} must be a table of settings; got {str(values)!r}")
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        arguments: dict[str, Any] = {} if start is None else {name: getattr(start, name) for name in fields}
        for name, value in values.items():
            if name not in fields:
                raise InputError(self._unknown(name, prefix, cls))
            below = None if start is None else getattr(start, name)
            part = _class_of(hints[name], value, below, f"{prefix}{name}")
            if part is None:
                arguments[name] = _read(value, hints[name], f"{prefix}{name}")
            else:  # another class than before takes its own defaults
                arguments[name] = self.build(part, value, below if type(below) is part else None, f"{prefix}{name}.")
        missing = [
            name
            for name, field in fields.items()
            if name not in arguments
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f"{prefix}{missing[0]} must be given; got none")
        try:
            return cls(**arguments)
        except ValueError as error:  # a component names its own field; which component it is, is known here
            message = str(error)
            raise InputError(message if message.startswith(prefix) else prefix + message) from None

    def _unknown(self, name: str, prefix: str, cls: type[Any]) -> str:
        here = [prefix + field.name for field in dataclasses.fields(cls)]
        near = [known for known in self._known if known.split(".")[-1] == name]
        names = dict.fromkeys(here + self._known)  # once each: most are in both
        near += [known for known in difflib.get_close_matches(prefix + name, names, n=3) if known not in near]
        return f"setting {prefix + name!r} must be a known name; the nearest are {', '.join((near or here)[:6])}"


def _class_of(hint: Any, value: Any, start: Any, name: str) -> type[Any] | None:
    """The dataclass that this field's value is built as, or None where the field is a plain value.

    Where there are several, their first field names each (model.architecture); without it, the class is start's, and
    without that the first of them.
    """
    options: list[Any] = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
    if len(options) < 2:
        return options[0] if options else None
    key = dataclasses.fields(options[0])[0].name
    by_name = {dataclasses.fields(option)[0].default: option for option in options}
    wanted = value.get(key) if isinstance(value, Mapping) else None
    if wanted is None:
        return options[0] if start is None else type(start)
    if not isinstance(wanted, str) or wanted not in by_name:
        raise InputError(f"{name}.{key} must be one of {', '.join(map(str, by_name))}; got {str(wanted)!r}")
    chosen: type[Any] = by_name[wanted]
    return chosen


def _all_names(cls: type[Any], values: Any, start: Any, prefix: str) -> list[str]:
    """Every setting there is, under the classes that these values choose."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        value = values.get(name) if isinstance(values, Mapping) else None
        below = getattr(start, name, None)
        part = _class_of(hint, value, below, prefix + name)
        names += [prefix + name] if part is None else _all_names(part, value, below, f"{prefix}{name}.")
    return names


def _read(value: Any, hint: Any, name: str) -> Any:
    """The value as the hint says; texts from --set are parsed, values from files are only checked."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None or (isinstance(value, _Text) and value.lower() in ("none", "null")):
            return None
        return _read(value, inner[0], name)
    if origin is typing.Literal:
        return str(value)  # the component itself names its choices
    if origin is tuple:
        parts = (value.split(",") if value else []) if isinstance(value, _Text) else value
        if not isinstance(parts, list | tuple):
            raise InputError(f"{name} must be a list; got {value!r}")
        return tuple(str(part).strip() for part in parts)
    if isinstance(value, _Text):
        return _parse(value, hint, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise InputError(f"{name} must be {_KINDS[hint]}; got {value!r}")
    return value


def _parse(text: str, hint: Any, name: str) -> Any:
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif hint is str:
        return str(text)
    else:
        with contextlib.suppress(ValueError, OverflowError):
            value = hint(text)
            if math.isfinite(value):
                return value
    raise InputError(f"{name} must be {_KINDS[hint]}; got {str(text)!r}")


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
