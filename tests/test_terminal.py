"""What a command owes to who started it: colours, progress, examples, completion, exit codes."""

import errno
import functools
import io
import logging
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm import launch, terminal

COLOR = re.compile(r"\x1b\[[0-9;]*m")
EXAMPLES = {
    name: f for group in ({"": cli.COMMANDS} | cli.GROUPS).values() for name, f in group.items()
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch):
    """Puts streams in place of the two of this process; both are terminals if nothing else."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def put(out: io.StringIO | None = None, err: io.StringIO | None = None):
        both = out or Terminal(), err or Terminal()
        monkeypatch.setattr(sys, "stdout", both[0])
        monkeypatch.setattr(sys, "stderr", both[1])
        return both

    return put


@pytest.fixture
def at_home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared_home)
    return shared_home


def run(*args: str) -> int:
    return launch.run_main(lambda: cli.command(args))


# --- log lines


def logged_by(name: str = "jaxlm") -> tuple[list[logging.Handler], int, bool]:
    logger = logging.getLogger(name)
    return logger.handlers[:], logger.level, logger.propagate


def test_lines_go_to_the_innermost_alone_and_then_as_before(caplog: pytest.LogCaptureFixture):
    log, before = logging.getLogger("jaxlm.x"), logged_by()
    outer, inner, warned = [], [], []
    with terminal.log_to(outer.append):
        log.info("100% of it")
        log.debug("not for people")
        with terminal.log_to(inner.append, warned.append):
            log.info("two")
            log.warning("three")
        threads = [threading.Thread(target=log.warning, args=["four"]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outer == ["100% of it", *["Warning: four"] * 4]
    assert (inner, warned) == (["two"], ["Warning: three"])
    assert logged_by() == before and not caplog.messages
    log.warning("five")
    assert caplog.messages == ["five"] and len(outer) == 5


def test_what_ends_out_of_turn_takes_no_lines_from_another():
    log, before, first, second = logging.getLogger("jaxlm.x"), logged_by(), [], []
    one, two = terminal.log_to(first.append), terminal.log_to(second.append)
    one.__enter__()
    two.__enter__()  # as in another thread
    one.__exit__(None, None, None)
    log.info("a line")
    two.__exit__(None, None, None)
    assert (first, second) == ([], ["a line"]) and logged_by() == before


def test_a_handler_of_the_caller_s_own_gets_all(tmp_path: Path):
    logger, handler = logging.getLogger("jaxlm"), logging.FileHandler(tmp_path / "log")
    logger.addHandler(handler)
    try:
        with terminal.log_to(lambda line: None):
            logging.getLogger("jaxlm.x").info("a line")
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "log").read_text() == "a line\n"


@terminal.prints_lines
def talk(text: str = "a line") -> int:
    logging.getLogger("jaxlm.x").info(text)
    return len(text)


def test_a_function_prints_its_lines_unless_the_program_listens(capsys, caplog):
    def printed() -> str:
        assert talk() == 6
        return capsys.readouterr().out

    assert printed() == "a line\n" and not caplog.messages
    with terminal.log_to(lambda line: None):
        assert printed() == ""
    with caplog.at_level(logging.WARNING, "jaxlm"):
        assert printed() == ""
    with caplog.at_level(logging.INFO):
        assert not caplog.messages and printed() == "" and caplog.messages == ["a line"]


def test_a_program_that_disables_loggers_misses_no_line():
    found: list[str] = []
    logger = logging.getLogger("jaxlm.x")
    logger.disabled = True  # as `logging.config.dictConfig` leaves those that exist
    try:
        with terminal.log_to(found.append):
            logger.warning("step 4 is damaged")
        assert found == ["Warning: step 4 is damaged"] and logger.disabled
    finally:
        logger.disabled = False


def test_a_line_that_cannot_be_printed_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert talk() == 6
        with terminal.log_to(Gone().write):
            assert talk() == 6
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert talk("größe") == 5
    sys.stdout.flush()
    assert raw.getvalue() == b"gr\\xf6\\xdfe\n"


# --- colours

TOLD = (["--help"], ["nonsense"], ["checkpoints", "list", text_run.RUN, "--jsn"], ["checkpoints"])


@pytest.mark.parametrize("args", TOLD, ids=" ".join)
def test_colours_are_for_terminals_that_want_them(args: list[str], streams, monkeypatch):
    def told(out: io.StringIO | None = None, err: io.StringIO | None = None) -> str:
        both = streams(out, err)
        assert run(*args) == (0 if "--help" in args else 2)
        text = "".join(stream.getvalue() for stream in both)
        assert "jaxlm" in text
        return text

    assert COLOR.search(told())
    assert "\x1b" not in told(out=io.StringIO()) and "\x1b" not in told(err=io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # empty is as if it were not there
    assert COLOR.search(told())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in told()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in told()


def in_terminal(home: Path, *args: str, **env: str) -> tuple[int, str]:
    """Exit code and all that a command says to a terminal, in a process of its own."""
    ours, theirs = pty.openpty()
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm", *args],
        cwd=home,
        stdout=theirs,
        stderr=theirs,
        env={**base, "PYTHONPATH": str(text_run.REPO), "TERM": "xterm-256color", **env},
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(), said.decode()


def test_a_real_terminal(shared_home: Path):
    code, said = in_terminal(shared_home, "checkpoints", "verify", text_run.RUN)
    assert code == 0 and "Verifying" in said and COLOR.search(said.replace("\x1b[0m", ""))
    assert "12: sound" in said and "0 of 3 steps are damaged" in said
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.slow
def test_a_real_terminal_without_colours(shared_home: Path):
    code, said = in_terminal(shared_home, "checkpoints", "verify", text_run.RUN, NO_COLOR="1")
    assert code == 0 and "Verifying" in said and "12: sound" in said
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9)[0-9]", said)


# --- progress


def test_progress_is_for_a_terminal_on_standard_error(streams, monkeypatch):
    def seen(**kinds: io.StringIO) -> str:
        out, err = streams(**kinds)
        assert list(terminal.track([1, 2, 3], "Counting")) == [1, 2, 3]
        assert out.getvalue() == ""
        return err.getvalue()

    assert "Counting" in seen() and "Counting" in seen(out=io.StringIO())
    assert seen(err=io.StringIO()) == ""
    monkeypatch.setenv("TERM", "dumb")
    assert seen() == ""


def test_what_is_printed_beside_a_bar_goes_where_it_should(streams):
    out, err = streams(out=io.StringIO())
    with terminal.progress("Counting"):
        print('{"a": 1}')
    assert out.getvalue() == '{"a": 1}\n' and "Counting" in err.getvalue()
    assert '"a"' not in err.getvalue()  # rich would have put it there
    _, err = streams()
    with terminal.progress("Counting"):
        print("a line")
    assert "a line\n" in err.getvalue()  # the same terminal, above the bar


def test_one_bar_at_a_time(streams):
    _, err = streams()
    with terminal.progress("Outer"), terminal.progress("Inner") as advance:
        advance(1)
    assert "Outer" in err.getvalue() and "Inner" not in err.getvalue()
    with pytest.raises(ZeroDivisionError), terminal.progress("Broken"):
        raise ZeroDivisionError
    with terminal.progress("Another"):
        pass
    assert "Another" in err.getvalue()


LONG = {
    "checkpoints diff RUN RUN": "Comparing",
    "checkpoints copy RUN copy": "Copying",
    "checkpoints prune RUN": "Verifying",
    "report RUN": "Reading",
    "eval RUN@8": "Evaluating step 8",
    "export RUN exported": "Writing the weights",
    "import exported imported": "Saving the run",
    "checkpoints average RUN": "Averaging",
}


@pytest.mark.slow
def test_all_long_work_says_so(own_home: Path, streams, monkeypatch):
    monkeypatch.chdir(own_home)
    for command, what in LONG.items():
        out, err = streams(out=io.StringIO())
        assert run(*command.replace("RUN", text_run.RUN).split()) == 0, command
        assert what in err.getvalue(), command
        assert "\x1b" not in out.getvalue(), command


# --- help


def shown(*args: str) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", out)
        patch.setenv("COLUMNS", "80")
        cli.command([*args, "--help"])
    assert not stop.value.code
    return out.getvalue()


def commands() -> list[tuple[str, ...]]:
    alone = [(name,) for name in cli.COMMANDS if name not in cli.GROUPS]
    return [*alone, *((group, name) for group in cli.GROUPS for name in cli.GROUPS[group])]


@pytest.mark.parametrize("words", [(), *commands()], ids=" ".join)
def test_help_ends_with_examples_that_are_right(words: tuple[str, ...], monkeypatch):
    _, _, examples = shown(*words).partition("\n\nexamples:\n")
    lines = examples.splitlines()
    assert 1 <= len(lines) <= 3 and max(map(len, lines)) <= 80
    called = []
    for commands in (cli.COMMANDS, *cli.GROUPS.values()):
        for name, function in [item for item in commands.items() if item[0] not in cli.GROUPS]:

            def note(*args: object, name: str = name, **kwargs: object) -> int:
                called.append(name)
                return 0

            monkeypatch.setitem(commands, name, functools.wraps(function)(note))
    for group, commands in cli.GROUPS.items():
        monkeypatch.setitem(cli.COMMANDS, group, cli._group("", commands))
    for line in lines:
        args = shlex.split(re.findall(r"jaxlm [^)>#]*", line)[0])[1:]
        if "--help" not in args:
            assert cli.command(args) == 0, line
    assert not words or called == [words[-1]] * len(lines)


def test_the_help_of_launch_ends_with_examples(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    examples = capsys.readouterr().out.partition("\n\nexamples:\n")[2].splitlines()
    assert 1 <= len(examples) <= 3 and max(map(len, examples)) <= 80
    for line in examples:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(text_run.REPO)
            assert launch.parse_config(shlex.split(line, comments=True)[2:], prog="launch.py")


# --- completion


def complete(shell: str, line: str, folder: Path) -> set[str]:
    """What is proposed at the end of a line."""
    script = folder / f"script.{shell}"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert cli.command(["completion", shell]) == 0
    script.write_text(out.getvalue())
    if shell == "fish":
        code = f"source {script}; complete -C {shlex.quote(line)}"
    else:
        words = " ".join(shlex.quote(word) for word in line.split(" "))
        code = (
            f'source {script}; complete -p jaxlm | grep -q -e "-o default" || exit 3\n'
            f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _jaxlm\n"
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
    done = subprocess.run([shell, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return {found.split("\t")[0] for found in done.stdout.split("\n")} - {""}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes_words_flags_and_paths(shell: str, tmp_path: Path):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    (tmp_path / "runs").mkdir()
    assert complete(shell, "jaxlm che", tmp_path) == {"checkpoints"}
    assert complete(shell, "jaxlm checkpoints ", tmp_path) == set(cli.GROUPS["checkpoints"])
    found = complete(shell, "jaxlm checkpoints prune runs/tiny --k", tmp_path)
    assert found == {"--keep_latest", "--keep_every"}
    assert complete(shell, "jaxlm plan --save_", tmp_path) == {"--save_cost_s"}
    assert "--optim.learning_rate" in complete(shell, "jaxlm prepare --optim", tmp_path)
    # A path: nothing of ours, so that bash does what it does by default.
    assert complete(shell, "jaxlm checkpoints list ru", tmp_path) == (
        {"runs/"} if shell == "fish" else set()
    )
    assert complete(shell, "jaxlm checkpoints list nothing-of-this-name", tmp_path) == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_flag_is_completed(shell: str, capsys: pytest.CaptureFixture):
    assert cli.command(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
    for words in commands():
        flags = re.findall(r"^│ --([a-z][\w.-]*)", shown(*words), re.M)
        at = next(line for line in script.splitlines() if f"{' '.join(words)} " in line)
        lines = script if shell == "fish" else at
        for flag in flags:
            assert flag.replace("-", "_") in lines, (words, flag)


# --- exit codes


def interrupted() -> int:
    raise KeyboardInterrupt


CODES = {
    "--help": 0,
    "checkpoints list RUN": 0,
    "checkpoints list RUN --help": 0,
    "checkpoints diff RUN RUN": 0,
    "checkpoints verify RUN": 0,
    "completion bash": 0,
    "checkpoints diff RUN@4 RUN@8": 1,
    "checkpoints verify DAMAGED": 1,
    "checkpoints copy DAMAGED copy": 1,
    "checkpoints list none": 1,
    "checkpoints prune RUN --keep_latest 0": 1,
    "sample RUN --num_samples 0": 1,
    "eval RUN --paired": 1,
    "report none": 1,
    "prepare": 1,
    "": 2,
    "checkpoints": 2,
    "nonsense": 2,
    "checkpoints nonsense": 2,
    "checkpoints list": 2,
    "checkpoints list RUN --jsn": 2,
    "completion csh": 2,
    "plan --topology": 2,
    "prepare --config configs/tiny.py --num_steps 0": 2,
}


def test_exit_codes(own_home: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(own_home)
    shutil.copytree(text_run.RUN, "damaged")
    text_run.damage(Path("damaged/checkpoints/8"))
    for line, code in CODES.items():
        args = line.replace("RUN", text_run.RUN).replace("DAMAGED", "damaged").split()
        assert run(*args) == code, line
        said = capsys.readouterr()
        assert "Traceback" not in said.err and said.out + said.err, line
        if code == 2:
            assert said.out == "", line
    assert launch.run_main(interrupted) == 130
    assert capsys.readouterr().err.count("\n") == 1
    page = (text_run.REPO / "docs/commands.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
    assert codes == {*CODES.values(), terminal.STOPPED, 130, 141}


# As in a shell: what is written at the end is what may fail.
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
BUFFERED["PYTHONPATH"] = str(text_run.REPO)


def with_closed_pipe(*command: str, cwd: Path) -> tuple[int, str]:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, cwd=cwd, env=BUFFERED
    )
    os.close(writer)
    return done.returncode, done.stderr.decode()


def test_a_reader_that_goes_away_is_no_error(shared_home: Path):
    assert with_closed_pipe("-m", "jaxlm", "--help", cwd=shared_home) == (141, "")
    found = with_closed_pipe("-m", "jaxlm", "checkpoints", "list", text_run.RUN, cwd=shared_home)
    assert found == (141, "")
    code, said = with_closed_pipe("-c", "print(1)", cwd=shared_home)  # the control
    assert code != 141 and "BrokenPipeError" in said


CTRL_C = "import signal; signal.raise_signal(signal.SIGINT)"
# Module, what is in it, what imports it, lines on standard error.
INTERRUPTED_IMPORTS = {
    "of the command": ("tyro", CTRL_C, "from jaxlm.__main__ import main; main()", 0),
    "in its work": (
        "work",
        f"try:\n  {CTRL_C}\nexcept KeyboardInterrupt:\n  raise ImportError",
        "from jaxlm.launch import run_main; run_main(lambda: __import__('work'))",
        1,
    ),
}


@pytest.mark.parametrize("which", INTERRUPTED_IMPORTS)
def test_ctrl_c_in_an_import_is_one_line_at_most(which: str, tmp_path: Path):
    module, text, code, lines = INTERRUPTED_IMPORTS[which]
    (tmp_path / f"{module}.py").write_text(text)
    env = {**BUFFERED, "PYTHONPATH": f"{tmp_path}{os.pathsep}{text_run.REPO}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (130, lines, b""), done


def test_ctrl_c_is_one_line(streams, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    out, err = streams()
    try:
        assert launch.run_main(lambda: signal.raise_signal(signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.getvalue() == "" and err.getvalue().count("\n") == 1


# --- a terminal that is gone


class Gone(Terminal):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        self.write("")


def test_a_terminal_that_goes_away_ends_no_command(at_home: Path, streams):
    streams(Gone(), Gone())
    assert run("checkpoints", "verify", text_run.RUN) == 0  # with progress
    assert run("--help") == 0 and run("nonsense") == 2 and run("checkpoints", "list", "none") == 1


def test_what_a_file_does_not_take_is_an_error(at_home: Path, streams):
    class Full(Gone):
        def isatty(self) -> bool:
            return False

    _, err = streams(Full(), Full())
    assert run("checkpoints", "list", text_run.RUN) == 1
    _, err = streams(Full())
    assert run("checkpoints", "list", text_run.RUN) == 1 and "Input/output error" in err.getvalue()


@pytest.mark.parametrize("none", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=str)
def test_streams_that_were_closed_end_no_command(at_home: Path, streams, monkeypatch, none):
    both = streams()
    for name in none:
        monkeypatch.setattr(sys, name, None)
    assert run("checkpoints", "verify", text_run.RUN) == 0
    assert run("--help") == 0 and run("checkpoints", "list", "none") == 1
    said = both[0].getvalue()
    assert ("usage:" in said) == ("stdout" not in none) and "found no checkpoints" not in said


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path):
    code = (
        "import os, sys; from jaxlm import terminal; terminal.guard_streams()\n"
        "file = open('file', 'w'); assert file.fileno() > 2\n"
        "print('out'); print('err', file=sys.stderr); terminal.write_error('err')\n"
        "os.system('echo child; echo child >&2')"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, cwd=tmp_path, env=BUFFERED).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_stream_gets_what_it_can_encode(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def tell() -> None:
        print("größe \udcff")
        raise SystemExit("Größe")

    assert launch.run_main(tell) == 1
    sys.stdout.flush()
    assert out.buffer.getvalue() == b"gr\\xf6\\xdfe \\udcff\n"  # type: ignore[attr-defined]
    sys.stderr.flush()
    assert err.buffer.getvalue() == b"Gr\\xf6\\xdfe\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_before_the_first_step_stops_a_run_at_once(
    ignored: bool, at_home: Path, monkeypatch
):
    """As SIGTERM does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    monkeypatch.setattr(launch, "_train", lambda _: signal.raise_signal(signal.SIGHUP))
    try:
        code = launch.run_main(lambda: launch.main(["--config", "configs/tiny.py"]))
        assert code == (0 if ignored else terminal.STOPPED)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_is_no_success(shared_home: Path):
    command = [sys.executable, "-m", "jaxlm", "completion", "bash"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, cwd=shared_home, env=BUFFERED
        )
    assert done.returncode == 1 and b"No space left" in done.stderr
