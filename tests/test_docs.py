"""Every command and every example of the docs is run, on a small run."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import runs

from jaxlm import __main__ as cli
from jaxlm import launch

# Each page, and how many snippets it has at least.
PAGES = {
    "README.md": 4,
    "docs/checkpoints.md": 4,
    "docs/evals.md": 3,
    "docs/interchange.md": 2,
    "docs/keep.md": 3,
    "docs/library.md": 4,
    "docs/report.md": 1,
    "docs/sample.md": 2,
}
WITH_LAUNCH = {"README.md", "docs/checkpoints.md"}
# Tested elsewhere, or not to be had here: an install, the whole suite, a proof, an accelerator or
# its compiler.
NOT_RUN = re.compile(
    r"^(pip install|uv run pytest|uv run --extra|python -m venv|git clone|"
    r"jaxlm prove-resume|jaxlm plan)\b"
)
# The names of the folders that a page takes for granted, beside runs/tiny.
SECOND_RUN = "runs/tiny-2"


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def snippets(page: str, text: str) -> Iterator[Snippet]:
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        line = text[: match.start()].count("\n") + 2
        yield Snippet(page, line, match[1], match[2])


def run_shell(text: str) -> list[str]:
    """Runs the commands of a snippet, ours in this process; returns those that were not run."""
    not_run = []
    for line in text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("#")
        told = re.search(r"exit code (\d+)", comment)
        expected = int(told[1]) if told else 0
        for part in command.split("&&"):
            if NOT_RUN.match(part.strip()):
                not_run.append(part.strip())
            elif part.strip():
                assert run_command(part) == expected, line
    return not_run


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


def run_page(page: str, text: str) -> tuple[int, list[str]]:
    """Runs the snippets of a page in order, in one Python and one folder."""
    names: dict[str, object] = {}
    count, not_run = 0, []
    for snippet in snippets(page, text):
        if snippet.language == "bash":
            not_run += run_shell(snippet.text)
        elif snippet.language == "python":
            code = "\n" * (snippet.line - 1) + snippet.text  # so that errors name the page's line
            exec(compile(code, snippet.page, "exec"), names)
        else:
            assert snippet.language == "text", snippet
            continue
        count += 1
    return count, not_run


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_of_a_page_fit_the_real_configs(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs.REPO)
    text = (runs.REPO / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"launch\.py (--config configs/[^#`\n]*)", text)
    for flags in map(str.split, commands):
        if "--help" in flags:
            continue
        config = launch.parse_config(flags, prog="launch.py")
        if "--num_steps" in flags and "--run_dir" not in flags:
            assert config.num_steps > launch.load_config(flags[1]).num_steps, flags
    assert commands or page not in WITH_LAUNCH


@pytest.fixture
def home(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of a user with two runs; config and run are of the plan that diverged."""
    home = shutil.copytree(tiny_run, tmp_path / "home")
    shutil.copytree(home / runs.RUN, home / SECOND_RUN)
    config = home / "configs" / "tiny.py"
    text = config.read_text().replace("learning_rate=1e-2", "learning_rate=3.0")
    config.write_text(text.replace("num_steps=8", "num_steps=12"))
    shutil.copy(config, home / "configs" / "180m.py")  # the flags are tried, not the size
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of(page: str, home: Path):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        count, not_run = run_page(page, (runs.REPO / page).read_text())
    assert count >= PAGES[page]
    said = out.getvalue()
    if page == "README.md":
        assert {"pip install uv", "uv run pytest"} <= set(not_run)
    else:
        assert not_run == []
    if page == "docs/interchange.md":
        assert "step 8 as Llama" in said and "51,360 parameters in bfloat16" in said
        assert "runs/imported@0 (step 0): loss 5." in said
        assert "Beginning with the weights of step 0 of runs/imported" in said
    if page == "docs/checkpoints.md":
        assert "Resuming from step 12" in said and "Branching from step 8" in said
        assert "Warning: step 8 is damaged (params/" in said
        assert "every array is equal to the bit" in said and "arrays differ" in said


def test_a_broken_snippet_is_found(home: Path):
    with pytest.raises(ZeroDivisionError):
        run_page("x", "text\n```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match="runs/none"):
        run_page("x", "```bash\njaxlm checkpoints list runs/none\n```\n")
    with pytest.raises(AssertionError, match="no test knows"):
        run_page("x", "```bash\ncurl somewhere\n```\n")
    with pytest.raises(AssertionError):
        run_page("x", f"```bash\njaxlm checkpoints list {runs.RUN}  # exit code 1\n```\n")


@pytest.mark.parametrize(
    "page", [*PAGES, "docs/trust.md", "docs/plan.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]
)
def test_the_links_of(page: str):
    path = runs.REPO / page
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


def test_the_map_names_every_file_once():
    tree = (runs.REPO / "ARCHITECTURE.md").read_text().split("```")[1]
    package, named = "", []
    for line in tree.partition("jaxlm/\n")[2].splitlines():
        if folder := re.match(r"  (\w+)/ ", line):
            package = folder[1]
        elif file := re.match(r"( {2}| {4})(\w+\.py) +\S", line):
            named.append(f"{package}/{file[2]}" if len(file[1]) == 4 else file[2])
    files = {
        path.relative_to(runs.REPO / "jaxlm").as_posix()
        for path in (runs.REPO / "jaxlm").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(files) > 30
    assert sorted(named) == sorted(files)
    configs = {path.name for path in (runs.REPO / "configs").glob("*.py")}
    assert {name for name in configs if f"configs/{name} " not in tree} == set()


def test_every_flag_named_in_the_docs_exists(home: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        launch.main(["--config", "configs/tiny.py", "--help"])
    known = {
        flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w.-]+)", capsys.readouterr().out)
    }
    known |= {"config", "help", "json", "extra", "group", "eval", "paired", "source", "topology"}
    known |= {"keep_latest", "keep_every", "disk_budget_gb", "delete", "last", "steps", "out"}
    known |= {"dtype", "max_shard_gb", "push", "follow", "poll_s", "tasks", "include_path"}
    known |= {"prompt", "num_samples", "max_tokens", "temperature", "top_k", "top_p"}
    for page in PAGES:
        text = (runs.REPO / page).read_text()
        named = {
            name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text)
        }
        named -= {"xla_gpu_deterministic_ops", "model", "output_dir", "outfile", "outtype"}
        assert named - known == set(), page


def test_the_readme_is_short():
    assert len((runs.REPO / "README.md").read_text().splitlines()) <= 150
