"""The `jaxlm` command: its subcommands, and the function of each."""

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from jaxlm.huge_pages import use_huge_pages

try:
    if Path(sys.argv[0]).name in ("jaxlm", "__main__.py") and sys.argv[1:2] == ["train"]:
        use_huge_pages()  # before the slow imports: it may start Python again

    import tyro
    from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

    from jaxlm.cli import cache, checkpoints, interchange, models, runs
    from jaxlm.cli.completion import script
    from jaxlm.config import Config, leaves
    from jaxlm.extras import version
    from jaxlm.launch import leave, run_main, with_examples
except KeyboardInterrupt:  # an interrupted import would print a traceback
    raise SystemExit(130) from None


def _choice(commands: dict[str, Callable[..., int]]) -> Any:
    return Union[  # noqa: UP007 - built at run time
        tuple(Annotated[Any, tyro.conf.subcommand(n, constructor=f)] for n, f in commands.items())
    ]


def _group(doc: str, commands: dict[str, Callable[..., int]]) -> Callable[[int], int]:
    def group(command: int) -> int:
        return command  # the exit code: tyro has called it

    group.__annotations__["command"] = OmitArgPrefixes[OmitSubcommandPrefixes[_choice(commands)]]
    group.__doc__ = doc
    return group


def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print the script that completes words and flags of jaxlm at the Tab key.

    Args:
      shell: bash, zsh or fish.

    Examples:
      eval "$(jaxlm completion bash)"  # in ~/.bashrc
      eval "$(jaxlm completion zsh)"   # in ~/.zshrc, after compinit
      jaxlm completion fish > ~/.config/fish/completions/jaxlm.fish
    """
    proposed = {"": [*COMMANDS], "completion": ["bash", "zsh", "fish"]}
    proposed |= {name: [*group] for name, group in GROUPS.items()}
    for group, functions in {"": COMMANDS, **GROUPS}.items():
        for name, function in functions.items():
            proposed.setdefault(f"{group} {name}".strip(), _flags(name, function))
    print(script(shell, proposed))
    return 0


def _flags(name: str, function: Callable[..., int]) -> list[str]:
    names = [p.name for p in signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    if name in CONFIG_COMMANDS:
        names += [*re.findall(r"--(\w+)(?![\w.])", function.__doc__ or ""), *leaves(Config())]
    return [f"--{name}" for name in dict.fromkeys(["help", *names])]


CONFIG_COMMANDS = ("train", "prepare", "prove-resume", "plan")
"""Commands that take the flags of launch.py."""
GROUPS: dict[str, dict[str, Callable[..., int]]] = {
    "cache": {
        "list": cache.list_all,
        "verify": cache.verify,
        "export": cache.export,
        "clear": cache.clear,
    },
    "checkpoints": {
        "list": checkpoints.list_all,
        "compare": checkpoints.compare,
        "diff": checkpoints.diff,
        "verify": checkpoints.verify,
        "prune": checkpoints.prune,
        "copy": checkpoints.copy,
        "average": checkpoints.average,
    },
}
COMMANDS: dict[str, Callable[..., int]] = {
    "train": runs.train,
    "prepare": runs.prepare,
    "batch": runs.batch,
    "prove-resume": runs.prove_resume,
    "plan": runs.plan,
    "cache": _group("List, verify and clear prepared tokens and programs.", GROUPS["cache"]),
    "checkpoints": _group("List, check, prune and copy checkpoints.", GROUPS["checkpoints"]),
    "eval": models.evaluate,
    "benchmark": models.benchmark,
    "sample": models.sample,
    "export": interchange.export,
    "import": interchange.import_folder,
    "report": runs.report,
    "doctor": runs.doctor,
    "completion": completion,
}


def command(args: Sequence[str]) -> int:
    """Runs one command; returns its exit code.

    Examples:
      jaxlm checkpoints list runs/tiny
      jaxlm sample runs/tiny@best --prompt "My fellow citizens"
      jaxlm checkpoints prune --help
    """
    first, second = (*args, "", "")[:2]
    if first == "--version":
        print(f"jaxlm {version()}")
        return 0
    if not second and (not first or first in GROUPS):  # a word is missing: list the choices
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            command([*args, "--help"])
        raise SystemExit(2)
    with with_examples(GROUPS.get(first, {}).get(second) or COMMANDS.get(first, command)):
        if first in CONFIG_COMMANDS:
            return COMMANDS[first](tuple(args[1:]))
        return tyro.cli(OmitSubcommandPrefixes[_choice(COMMANDS)], prog="jaxlm", args=list(args))


def main() -> None:
    """The entry point: exits with the command's code, or 1 and a message."""

    def run() -> int:
        try:
            return command(sys.argv[1:])
        finally:
            sys.stdout.flush()  # a result that cannot be printed is an error

    leave(run_main(run))


if __name__ == "__main__":
    main()
