"""A strict reader of JSON from disk: a value of the annotated type, or an error.

Files are not trusted: size, depth and numbers are bounded, a duplicate key is an error, and the
type of every value is checked against the annotation.
"""

import collections
import dataclasses
import functools
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from jaxlm.errors import InputError
from jaxlm.files.durable import read_file

T = TypeVar("T")
MAX_BYTES = 1 << 24
"""Limit of a JSON file; the metadata of 10,000 arrays needs a tenth of it."""
hints_of = functools.cache(typing.get_type_hints)
"""The annotations of a class, cached: the look-up is slow."""
_MAX_DEPTH = 32
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def jsonable(value: T) -> T | str:
    """A value for JSON: NaN and infinities as strings, which `validate` accepts for a float."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_json(path: Path, kind: type[T]) -> T:
    """The validated content of a JSON file.

    Raises:
      OSError: the file cannot be read.
      ValueError: not a file, too large, not JSON or wrong kind; names the file.
    """
    data = read_file(path, MAX_BYTES)
    try:
        return parse_json(data, kind)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def parse_json(data: bytes, kind: type[T]) -> T:
    """The validated value of JSON in UTF-8.

    Raises:
      ValueError: not JSON (NaN, 1e999 and duplicate keys are refused), too deep, an integer beyond
        64 bits, or not of this kind.
    """
    try:
        text = data.decode()
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise InputError("nested too deeply") from error
    level = [value]  # by level: recursion would overflow
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
    if level:
        raise InputError(f"nested more than {_MAX_DEPTH} deep")
    if "\\ud" in text.lower():  # Raises for a lone surrogate: it cannot be printed.
        json.dumps(value, ensure_ascii=False).encode()
    return validate(value, kind)


def validate(value: Any, kind: Any, name: str = "") -> Any:
    """A JSON value, checked against an annotation.

    Nothing is converted, except that a dataclass is instantiated, and "NaN", "Infinity" and
    "-Infinity" become floats. Unknown keys are refused for a dataclass, allowed for a `TypedDict`.

    Args:
      value: a result of `json.loads`.
      kind: a scalar type, `Any`, `Literal`, `X | None`, `list[X]`, `dict[str, X]`, a `TypedDict` or
        a dataclass.
      name: of the value, for the message.

    Raises:
      ValueError: the value is of another kind, or the dataclass refuses it.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        kind, none = args
        assert none is type(None), "of unions, only X | None is needed"
        return None if value is None else validate(value, kind, name)
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _record(value, kind, name)
    if origin is list and type(value) is list:
        return [validate(item, args[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is dict and type(value) is dict:
        return {k: validate(item, args[1], f"{name}[{shown(k)}]") for k, item in value.items()}
    if kind is float and type(value) is str and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    expected = getattr(kind, "__name__", kind) if origin is None else kind
    if origin is Literal:
        fits = any(value == arg and type(value) is type(arg) for arg in args)
        expected = " or ".join(map(repr, args))
    elif type(value) is int and kind in (int, float):
        fits = -(2**63) <= value < 2**63
        expected = expected if fits else "an integer of 64 bits"
    else:
        fits = kind is Any or type(value) is kind
    if not fits:
        raise InputError(f"{name + ': ' if name else ''}found {shown(value)}, expected {expected}")
    return value


def shown(value: Any) -> str:
    """A value for a message: short, without control characters that a terminal would obey."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _record(value: Any, kind: Any, name: str) -> Any:
    hints = hints_of(kind)
    value = validate(value, dict[str, Any], name)
    prefix = f"{name}." if name else ""
    if typing.is_typeddict(kind):
        required = kind.__required_keys__
    else:
        # Without a default, both are MISSING.
        required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory}
        if unknown := sorted(value.keys() - hints.keys()):
            raise InputError(
                f"{prefix}{shown(unknown[0])[1:-1]}: not a field of this version of jaxlm; "
                "it was written by another version, so restore it with that one"
            )
    for key in sorted(required - value.keys()):
        raise InputError(f"{prefix}{key}: missing")
    known = {key: validate(value[key], hints[key], prefix + key) for key in hints if key in value}
    return {**value, **known} if typing.is_typeddict(kind) else kind(**known)


def _children(value: Any) -> list[Any]:
    if type(value) is dict:
        return list(value.values())
    return value if type(value) is list else []


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise InputError(f"found {text[:40]}, expected an integer of 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise InputError(f"found {text[:40]}, expected a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise InputError(f"found the key {shown(counts.most_common(1)[0][0])} more than once")
    return found
