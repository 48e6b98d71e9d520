"""Starts a run from a command line: config file, flags, error messages and exit codes."""

import argparse
import contextlib
import errno
import inspect
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import tyro

from jaxlm.config import Config, leaves
from jaxlm.errors import InputError, JaxlmError
from jaxlm.extras import version
from jaxlm.files.durable import expand
from jaxlm.files.strict import read_json
from jaxlm.insides import set_help_colors
from jaxlm.terminal import STOPPED, catch, guard_streams, wants_color, write_error

_INTERRUPTED = "interrupted; the same command resumes from the state on disk"


def parse_config(args: Sequence[str], prog: str) -> Config:
    """The config of `--config FILE|RUN`, changed by the flags that follow.

    Exits with code 2 and a message on wrong flags; `--help` lists all flags.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    known, flags = parser.parse_known_args(args)
    path = known.config
    config = load_config(path) if path else Config()
    if not path and not {"-h", "--help"} & set(flags):
        files = sorted(str(p) for p in Path("configs").glob("*.py"))
        found = ", ".join(files) or "configs/tiny.py of jaxlm's repository; this folder has none"
        raise InputError(f"--config: found nothing, expected a config file such as {found}")
    return tyro.cli(
        Config,
        prog=f"{prog} --config {path or 'FILE'}",
        description="Defaults are those of the config file.",
        default=config,
        args=flags,
    )


def load_config(path: str) -> Config:
    """The `config` of a Python file, or the config that a run was last started with.

    Args:
      path: a Python file, whose name becomes the name of the run folder; or a run folder or its
        config.json, to resume that run.

    Raises:
      ValueError: there is no such file, it defines no `config`, or it raises an error.
    """
    file = Path(expand(path, "--config"))
    if file.is_dir():
        file /= "config.json"
    if not file.is_file():
        files = ", ".join(sorted(str(p) for p in file.parent.glob("*.py"))) or "none"
        raise InputError(f"--config: found no file {file}, expected one of: {files}")
    if file.suffix == ".json":
        return _config_of_run(file)
    try:
        config = runpy.run_path(str(file)).get("config")
    except Exception as error:  # user code may raise anything
        raise InputError(f"--config: {file}, {_describe_error(error, str(file))}") from error
    if not isinstance(config, Config):
        raise InputError(f"--config: {file} defines no `config = jaxlm.Config(…)`")
    if config.run_dir == Config().run_dir:
        config = replace(config, run_dir=f"runs/{file.stem}")
    return config


def _config_of_run(file: Path) -> Config:
    try:
        config = read_json(file, Config)
    except ValueError as error:
        raise InputError(f"--config: {error}; expected the config.json of a run") from error
    if config.resume == "never":  # meant for the first start only
        config = replace(config, resume="auto")
    moved = Path(config.run_dir).resolve() != file.parent.resolve()
    return replace(config, run_dir=str(file.parent)) if moved else config


def _describe_error(error: Exception, file: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    text = traceback.format_exception_only(error)[-1].strip()
    text = str(error) if isinstance(error, JaxlmError) else text
    return f"line {lines[-1]}: {text}" if lines else text


def main(args: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code: 0 for a complete run, 75 for a stopped one.

    Examples:
      python launch.py --config configs/tiny.py
      python launch.py --config configs/tiny.py --num_steps 1000  # to step 1000
      python launch.py --config configs/tiny.py --seed 1 --run_dir runs/seed1
    """
    args = sys.argv[1:] if args is None else args
    if "--version" in args:
        print(f"jaxlm {version()}")
        return 0
    with with_examples(main):
        config = parse_config(args, prog="launch.py")
    return run(config)


def run(config: Config) -> int:
    """Trains, as a process of a cluster if the environment names one; returns the exit code."""
    # Before the loop there is nothing to save: stop at once, with the same exit code.
    before = catch(_stop_now, signal.SIGTERM, signal.SIGHUP)
    try:
        if "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return _train(config)
        from jaxlm.cluster import Cluster

        with Cluster(explain):
            return _train(config)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(config: Config) -> int:
    import jax  # slow: after --help and the checks of flags

    from jaxlm.cluster import check_equal
    from jaxlm.training.preflight import device_advice
    from jaxlm.training.train import train

    check_equal("settings", {name: value for name, (value, _) in leaves(config).items()})
    try:
        return 0 if train(config).complete else STOPPED
    except jax.errors.JaxRuntimeError as error:
        if advice := device_advice(error, config):
            raise SystemExit(f"error: {str(error).splitlines()[0]}\n{advice}") from error
        raise


def _stop_now(number: int, frame: FrameType | None) -> None:
    raise SystemExit(STOPPED)


@contextlib.contextmanager
def with_examples(function: Callable[..., object]) -> Iterator[None]:
    """Prints the examples of a docstring after a `--help` that is printed in the block."""
    try:
        yield
    except SystemExit as stop:
        examples = inspect.cleandoc(function.__doc__ or "").partition("\nExamples:\n")[2]
        if not stop.code and examples:
            print(f"\nexamples:\n{examples}")
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    # During an import, libraries turn KeyboardInterrupt into ImportError: exit at once.
    if any(f.filename.startswith("<frozen importlib") for f in traceback.extract_stack(frame)):
        write_error(_INTERRUPTED)
        os._exit(130)
    raise KeyboardInterrupt


def run_main(main: Callable[[], int | None]) -> int:
    """Calls `main`, and prints an error of jaxlm or of the operating system as one message.

    Any other error is a bug, printed with its traceback. `JAXLM_TRACEBACK=1` prints a traceback for
    every error.

    Returns:
      The exit code.
    """
    guard_streams()
    set_help_colors(wants_color())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        return main() or 0
    except SystemExit as stop:  # help, wrong flags, a stop before the first step
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells report it
    except (KeyboardInterrupt, ValueError, OSError, ImportError, RuntimeError) as error:
        code, text = explain(error)
        print(text or traceback.format_exc().rstrip(), file=sys.stderr)
        return code


def leave(code: int) -> NoReturn:
    """Ends this process now; `sys.exit` would wait for the threads of a failed save."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def explain(error: BaseException) -> tuple[int, str | None]:
    """The exit code and message of an error; the message is None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130, _INTERRUPTED
    if isinstance(error, SystemExit):
        return (error.code, "stopped") if isinstance(error.code, int) else (1, str(error.code))
    if os.environ.get("JAXLM_TRACEBACK"):
        return 1, None
    if isinstance(error, JaxlmError):
        return 1, f"error: {error}"
    # Of the machine: a full disk, a folder in place of a file. Only a bug looks for a missing file.
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        name = error.filename2 or error.filename
        where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
        return 1, f"error: {where}{error.strerror}"
    return 1, None


if __name__ == "__main__":
    leave(run_main(main))
