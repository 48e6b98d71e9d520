"""Every command and every example of the docs is run, on a small run."""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest import mock

import pytest
import reference
import text_run

from jaxlm import __main__ as cli
from jaxlm import launch
from jaxlm.config import Config, free, leaves
from jaxlm.data.batches import TrainBatches
from jaxlm.data.run_data import default_eval_tokens
from jaxlm.tracking.throughput import flops_per_token

PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (text_run.REPO / "docs").glob("*.md"))]
# Those with runs, programs and processes of their own: most of the time of this file.
SLOW_PAGES = {"README.md"} | {
    f"docs/{name}.md"
    for name in ("checkpoints", "coming-from", "data", "evals", "interchange", "keep")
    + ("library", "report", "sample", "tracking", "trust", "tutorial")
}
WITH_LAUNCH = {"README.md", "docs/checkpoints.md", "docs/data.md", "docs/tutorial.md"}
# Commands that no test runs as they stand here, and why.
NOT_RUN = {
    r"pip install uv": "these tests run in what it makes",
    r"pip install -r requirements\S*\.txt": "an install, which .ci/run makes",
    r"uv run pytest": "it is what runs this",
    r"uv run --extra (cuda|tpu) .*launch\.py": "needs an accelerator",
    r"(uv run --extra tpu )?jaxlm plan": "needs a compiler: tests/test_plan.py, where one is",
    r"jaxlm benchmark .*--tasks lambada_openai": "reads its texts from the Hub",
    r"HF_HUB_OFFLINE=1 jaxlm benchmark": "slow: tests/test_benchmark.py runs it in a process",
    r"jaxlm checkpoints copy .*gs://": "needs a bucket: tests/test_bucket.py, with an emulator",
    r"jaxlm cache export": "names a hash of paths: tests/test_tokens.py",
    r"python launch.py .*tokens:data": "needs files of that name: tests/test_tokens.py",
    r"python launch.py .*--tasks.names": "slow: tests/test_tasks.py runs it in a process",
    r"jaxlm prove-resume": "slow: tests/test_prove.py",
    r"python tests/chaos\.py": "takes 45 minutes: tests/test_chaos.py runs a short one",
    r'python -c "import conversion': "needs llama.cpp: run by tests/parity/test_llama_cpp.py",
}
A_COMMAND = re.compile(r"^ *\$? *(\w+=\S+ )*(jaxlm|python|uv|uvx|pip|launch\.py)(?=\s|$)", re.M)
# A run of minutes, which the first one that a user starts must not be.
OF_MINUTES = "benchmarks/5m.py"
# The names of the folders that a page takes for granted, beside runs/tiny.
SECOND_RUN = "runs/tiny-2"


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def snippets(page: str, text: str) -> Iterator[Snippet]:
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S):
        line = text[: match.start()].count("\n") + 2
        yield Snippet(page, line, match[1], match[2])


class Command(NamedTuple):
    words: str
    exit_code: int = 0
    stopped: bool = False
    """Someone presses Ctrl-C."""

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((why for form, why in NOT_RUN.items() if re.match(form, self.words)), None)


def commands(snippet: Snippet) -> Iterator[Command]:
    text = re.sub(r'"[^"]*"', lambda quoted: quoted[0].replace("\n", "; "), snippet.text)
    for line in text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("#")
        told = re.search(r"exit code (\d+)", comment)
        for part in filter(None, map(str.strip, command.split("&&"))):
            yield Command(part, int(told[1]) if told else 0, "press Ctrl-C" in comment)


def commands_of(page: str) -> list[Command]:
    found = snippets(page, (text_run.REPO / page).read_text())
    return [c for snippet in found if snippet.language == "bash" for c in commands(snippet)]


def run_command(command: str) -> int:
    words = shlex.split(command)
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    if words[0] == "python":
        words = words[1:]
    try:
        match words:
            case ["launch.py", *flags]:
                # The pages speak of the real config; the one of these tests has twelve steps.
                at = flags.index("--num_steps") + 1 if "--num_steps" in flags else 0
                flags[at : at + 1] = [str(min(int(flags[at]), 16))] if at else flags[:1]
                return launch.run_main(lambda: launch.main(flags))
            case ["jaxlm", *args]:
                return launch.run_main(lambda: cli.command(args))
    except SystemExit as stop:  # --help, or a wrong flag
        return int(stop.code or 0)
    match words:
        case ["du" | "rm", *_]:
            return subprocess.run(words, check=False).returncode
    raise AssertionError(f"no test knows how to run: {command}")


@contextlib.contextmanager
def ctrl_c(step: int) -> Iterator[None]:
    """Sends SIGINT once, when a run asks for the batch of a step."""
    sent, make = [], TrainBatches.__call__

    def send(self, index: int, rows: slice) -> object:
        if index == step and not sent:
            sent.append(index)
            os.kill(os.getpid(), signal.SIGINT)
        return make(self, index, rows)

    with mock.patch.object(TrainBatches, "__call__", send):
        yield
    assert sent


def run_page(page: str, text: str) -> int:
    """Runs the snippets of a page in order, in one Python and one folder; returns how many."""
    names: dict[str, object] = {}
    count = 0
    # Steps of the real config, as those of the one of these tests, which saves every fourth.
    text = re.sub(r"(?<!num_steps )\b([345])00\b", lambda step: str(4 * int(step[1]) - 8), text)
    for snippet in snippets(page, text):
        if snippet.language == "bash":
            for command in commands(snippet):
                if command.reason is None:
                    with ctrl_c(4) if command.stopped else contextlib.nullcontext():
                        assert run_command(command.words) == command.exit_code, command
                    count += 1
        elif snippet.language == "python":
            code = "\n" * (snippet.line - 1) + snippet.text  # so that errors name the page's line
            exec(compile(code, snippet.page, "exec"), names)
            count += 1
        else:
            assert snippet.language in ("", "text") or snippet.language[0] == "{", snippet
            assert not A_COMMAND.search(snippet.text), f"not run, for it is in no bash: {snippet}"
    return count


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_of_a_page_fit_the_real_configs(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(text_run.REPO)
    text = (text_run.REPO / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"launch\.py (--config configs/[^#`\n]*)", text)
    for flags in map(shlex.split, commands):
        if "--help" in flags:
            continue
        config = launch.parse_config(flags, prog="launch.py")
        if "--num_steps" in flags and "--run_dir" not in flags:
            assert config.num_steps > launch.load_config(flags[1]).num_steps, flags
    assert commands or page not in WITH_LAUNCH


@pytest.fixture
def home(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of a user with two runs; config and run are of the plan that diverged."""
    home = shutil.copytree(shared_home, tmp_path / "home")
    shutil.copytree(home / text_run.RUN, home / SECOND_RUN)
    config = home / "configs" / "tiny.py"
    text = config.read_text().replace("learning_rate=1e-2", "learning_rate=3.0")
    config.write_text(text.replace("num_steps=8", "num_steps=12"))
    shutil.copy(config, home / "configs" / "180m.py")  # the flags are tried, not the size
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in SLOW_PAGES else ()) for page in PAGES],
)
def test_the_snippets_of(page: str, home: Path):
    if page == "docs/tutorial.md":
        shutil.rmtree("runs")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_page(page, (text_run.REPO / page).read_text())
    said = out.getvalue()
    if page == "docs/tutorial.md":
        assert "is complete at step 12" in said and "0 of 3 steps are damaged" in said
        assert re.search(r"Resuming from step \d\b", said)
    if page == "docs/interchange.md":
        assert "step 8 as Llama" in said and "51,360 parameters in bfloat16" in said
        assert "runs/imported@0 (step 0): loss 5." in said
        assert "Beginning with the weights of step 0 of runs/imported" in said
    if page == "docs/checkpoints.md":
        assert "Resuming from step 12" in said and "Branching from step 8" in said
        assert "Warning: step 8 is damaged (params/" in said
        assert "every array is equal to the bit" in said and "arrays differ" in said


def test_the_docs_are_run():
    """How many commands, and that each of the others has its reason."""
    found = {page: commands_of(page) for page in PAGES}
    everything = [command for of_page in found.values() for command in of_page]
    not_run = [c for c in everything if c.reason]
    print(f"{len(everything)} commands: {len(everything) - len(not_run)} run, {len(not_run)} not")
    assert len(everything) - len(not_run) >= 80 and set(PAGES) > SLOW_PAGES
    for form in NOT_RUN:
        assert any(re.match(form, c.words) for c in not_run), f"no page has {form}"
    without = {page for page, of_page in found.items() if not of_page}
    assert without == {"docs/api.md", "docs/decisions.md", "docs/index.md", "docs/library.md"}


def test_a_broken_snippet_is_found(home: Path):
    with pytest.raises(ZeroDivisionError):
        run_page("x", "text\n```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match="runs/none"):
        run_page("x", "```bash\njaxlm checkpoints list runs/none\n```\n")
    with pytest.raises(AssertionError, match="no test knows"):
        run_page("x", "```bash\ncurl somewhere\n```\n")
    with pytest.raises(AssertionError):
        run_page("x", f"```bash\njaxlm checkpoints list {text_run.RUN}  # exit code 1\n```\n")
    for fence in ("```text", "```"):
        with pytest.raises(AssertionError, match="in no bash"):
            run_page("x", f"{fence}\nsaid\nA=1 jaxlm doctor\n```\n")


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_links_of(page: str):
    path = text_run.REPO / page
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


def test_every_page_is_in_the_site():
    listed = (text_run.REPO / "docs/index.md").read_text()
    pages = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES[1:]} - {"index"}
    assert {page for page in pages if f"\n{page}\n" not in listed} == set()


def missing_settings(text: str) -> list[str]:
    """Fields of the config that have no entry with their meaning, default and policy."""
    return [
        name
        for name, (value, policy) in leaves(Config()).items()
        if not re.search(
            rf"^`--{name}`\n: \S.*\n: .*; default `{re.escape(str(value))}`; .*\*{policy}\*$",
            text,
            re.M,
        )
    ]


def test_every_setting_is_in_the_reference():
    text = reference.settings()
    assert len(leaves(Config())) > 70 and missing_settings(text) == []
    assert ": `int`, at least 1 and at most 2147483647; default `704`" in text
    assert missing_settings(text.replace("`--model.d_ff`", "`--model.d_f`")) == ["model.d_ff"]
    assert missing_settings(text.replace("Base of the RoPE wavelengths.", "")) == [
        "model.rope_theta"
    ]
    assert len(missing_settings(text.replace("*fixed*", "*free*"))) > 10


def test_a_setting_without_its_docstring_is_refused():
    @dataclasses.dataclass
    class WithoutConfig:
        """One with, one without."""

        described: int = free(1)
        """What it is (steps)."""
        undescribed: Annotated[int, "x"] = free(2)

    lines = reference.describe(WithoutConfig, "x")
    assert [next(lines), next(lines)][1] == "`--x.described`\n: What it is (steps)."
    with pytest.raises(ValueError, match="WithoutConfig.undescribed: found no docstring"):
        list(lines)


def test_every_command_is_in_the_reference():
    text = reference.commands()
    found = re.findall(
        r"^## jaxlm (.*)\n\n```text\nusage: jaxlm (.*?)(?: --config FILE)? \[", text, re.M
    )
    assert len(found) >= 18 and all(name == used for name, used in found)
    words = {name.split()[0] for name, _ in found} | reference.CONFIG_COMMANDS
    assert words == set(cli.COMMANDS)


def test_the_map_names_every_file_once():
    tree = (text_run.REPO / "ARCHITECTURE.md").read_text().split("```")[1]
    package, named = "", []
    for line in tree.partition("jaxlm/\n")[2].splitlines():
        if folder := re.match(r"  (\w+)/ ", line):
            package = folder[1]
        elif found := re.match(r"( {2}| {4})((?:\w+\.py ,? ?)+) *\S", line.replace(",", " ,")):
            prefix = f"{package}/" if len(found[1]) == 4 else ""
            named += [prefix + name for name in re.findall(r"\w+\.py", found[2])]
    files = {
        path.relative_to(text_run.REPO / "jaxlm").as_posix()
        for path in (text_run.REPO / "jaxlm").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(files) > 30
    assert sorted(named) == sorted(files)
    configs = {path.name for path in (text_run.REPO / "configs").glob("*.py")}
    assert {name for name in configs if f"configs/{name} " not in tree} == set()


def test_every_flag_named_in_the_docs_exists():
    def flags(text: str) -> set[str]:
        named = re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text)
        return {name.replace("-", "_") for name in named}

    known = flags(reference.launch_help() + reference.commands())
    known |= {"config", "extra", "group", "version"}
    known |= {"kills", "plan", "signal"}  # of tests/chaos.py
    others = {"model", "output_dir", "outfile", "outtype", "logdir"}
    others |= {"xla_cpu_max_isa", "xla_dump_to"}
    page = (text_run.REPO / "docs/coming-from.md").read_text()  # its first column is of others
    others |= flags("".join(re.findall(r"^\|([^|]*)\|", page, re.M)))
    for page in PAGES:
        assert flags((text_run.REPO / page).read_text()) - known - others == set(), page


def work(config: Config) -> float:
    """Floating-point operations of a whole run, an eval being a third of a step for its tokens."""
    num_evals = config.num_steps // config.eval_interval
    num_tokens = config.num_steps * config.tokens_per_step
    num_tokens += num_evals * default_eval_tokens(config) // 3
    return num_tokens * flops_per_token(config.model, config.seq_len)


def test_the_first_run_is_short_and_has_something_to_show():
    first, before = (
        launch.load_config(str(text_run.REPO / p)) for p in ("configs/tiny.py", OF_MINUTES)
    )
    assert work(first) < work(before) / 5
    assert first.num_steps // first.eval_interval >= 4 and first.sample_prompt
    assert first.checkpoint.save_interval == first.eval_interval


def test_the_readme_is_short():
    assert len((text_run.REPO / "README.md").read_text().splitlines()) <= 150
