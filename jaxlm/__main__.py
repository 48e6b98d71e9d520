"""The `jaxlm` command: which function each of its words calls."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from jaxlm.cli import cache, checkpoints, interchange, models, runs
from jaxlm.launch import leave, run_main


def _choice(commands: dict[str, Callable[..., int]]) -> Any:
    return Union[  # noqa: UP007 - made of a list that only the run time knows
        tuple(Annotated[Any, tyro.conf.subcommand(n, constructor=f)] for n, f in commands.items())
    ]


def _group(doc: str, **commands: Callable[..., int]) -> Callable[[int], int]:
    def group(command: int) -> int:
        return command  # the exit code: tyro has called it

    group.__annotations__["command"] = OmitArgPrefixes[OmitSubcommandPrefixes[_choice(commands)]]
    group.__doc__ = doc
    return group


COMMANDS: dict[str, Callable[..., int]] = {
    "prepare": runs.prepare,
    "prove-resume": runs.prove_resume,
    "plan": runs.plan,
    "cache": _group("Look at and clear prepared tokens.", list=cache.list_all, clear=cache.clear),
    "checkpoints": _group(
        "Look at checkpoints, and tidy them up.",
        list=checkpoints.list_all,
        compare=checkpoints.compare,
        diff=checkpoints.diff,
        verify=checkpoints.verify,
        prune=checkpoints.prune,
        copy=checkpoints.copy,
        average=checkpoints.average,
    ),
    "eval": models.evaluate,
    "benchmark": models.benchmark,
    "sample": models.sample,
    "export": interchange.export,
    "import": interchange.import_folder,
    "report": runs.report,
    "doctor": runs.doctor,
}


def command(args: Sequence[str]) -> int:
    """Runs one command; returns its exit code."""
    if args and args[0] in ("prepare", "prove-resume", "plan"):
        return COMMANDS[args[0]](tuple(args[1:]))  # its flags are those of a config
    return tyro.cli(OmitSubcommandPrefixes[_choice(COMMANDS)], prog="jaxlm", args=list(args))


def main() -> None:
    """The entry point: exits with the command's code, or 1 and a message."""
    leave(run_main(lambda: command(sys.argv[1:])))


if __name__ == "__main__":
    main()
