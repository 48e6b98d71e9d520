"""The reference pages that are made from the code: the settings, and the commands.

conf.py puts them into the site; tests/test_docs.py checks them, and needs no Sphinx for it.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import textwrap
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from unittest import mock

from jaxlm import __main__ as cli
from jaxlm import launch
from jaxlm.config import Config

CONFIG_COMMANDS = {"prepare", "train"}
"""Commands whose flags are those of launch.py, which have a page of their own."""


def settings() -> str:
    """Every field of the config: its flag, meaning, type, default, and what a resume may do."""
    parts = {"": Config, **{f.name: type(f.default) for f in nested(Config)}}
    return "\n".join(line for prefix, cls in parts.items() for line in describe(cls, prefix))


def nested(cls: type) -> list[dataclasses.Field]:
    """The fields of a config that are configs themselves."""
    return [f for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.default)]


def describe(cls: type, prefix: str) -> Iterator[str]:
    """The lines of one dataclass: a heading, and a definition for each of its fields.

    Raises:
      ValueError: a field has no docstring.
    """
    types, meanings = types_and_docstrings(cls)
    yield f"## {prefix or 'The run'}\n\n{inspect.getdoc(cls)}\n"
    for field in dataclasses.fields(cls):
        if field in nested(cls):
            continue
        name = f"{prefix}.{field.name}" if prefix else field.name
        if field.name not in meanings:
            raise ValueError(f"{cls.__name__}.{field.name}: found no docstring below it")
        made = field.default is dataclasses.MISSING  # a dict, which each config has its own of
        default = {} if made else field.default
        policy = field.metadata["resume"]
        shown = default if isinstance(default, str) else repr(default)
        yield f"`--{name}`\n: {meanings[field.name]}"
        bounds = f", {text}" if (text := str(field.metadata["bounds"])) else ""
        yield f": {types[field.name]}{bounds}; default `{shown}`; on a resume: *{policy}*\n"


def types_and_docstrings(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """What the source says of each field: its annotation, and the string below it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    types, meanings = {}, {}
    for field, after in pairwise([*node.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign):
            name = ast.unparse(field.target)
            types[name] = in_words(field.annotation)
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meanings[name] = " ".join(str(after.value.value).split())
    return types, meanings


def in_words(annotation: ast.expr) -> str:
    """`int | None` as it is; of `Annotated` the type alone, and of `Literal` the values."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        values = annotation.slice.elts
        if (kind := ast.unparse(annotation.value)) == "Annotated":
            return in_words(values[0])
        if kind == "Literal":
            return ", ".join(f"`{ast.literal_eval(value)}`" for value in values)
    return f"`{ast.unparse(annotation)}`"


def commands() -> str:
    """What `jaxlm … --help` says of each command."""
    words = [[name] for name in cli.COMMANDS if name not in cli.GROUPS]
    words += [[group, name] for group, names in cli.GROUPS.items() for name in names]
    return "\n".join(
        f"## jaxlm {' '.join(each)}\n\n```text\n{say_help(partial(cli.command, [*each, '--help']))}"
        "\n```\n"
        for each in words
        if each[0] not in CONFIG_COMMANDS
    )


def launch_help() -> str:
    """What `launch.py --help` says: the flags of all settings."""
    return say_help(lambda: launch.main(["--help"]))


def say_help(command) -> str:
    """The text of a `--help`, in lines of 80 characters."""
    with (
        mock.patch.dict(os.environ, COLUMNS="80"),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.suppress(SystemExit),
    ):
        command()
    return re.sub(r" +$", "", out.getvalue().strip(), flags=re.M)
