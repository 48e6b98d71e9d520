"""Pins every dependency: in pyproject.toml for uv, in requirements*.txt for pip.

    uv run --no-project tools/pin.py           # take the newest versions
    uv run --no-project tools/pin.py --check   # exit 1 unless the pins are complete and installable

(`--no-project`, so that pins which no longer resolve can be made anew.)

uv's own lock file holds the address of every package, and pip cannot read it. So uv resolves
once, for all Pythons, systems, extras and groups together, and what it found is written out by
name and version.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "# pins: begin\n", "# pins: end\n"
PIN = re.compile(r"[a-z0-9-]+==[^\s;/]+( ; [^/]+)?")
REGENERATE = "uv run --no-project tools/pin.py"

# All that a run can be asked for by flag, and its report. The extras of one accelerator are left to
# its owner.
EXTRAS = ("hf", "report", "tensorboard", "text", "tfds", "wandb")
EVERYWHERE = [f"--extra={name}" for name in EXTRAS]
REQUIREMENTS = {
    "requirements.txt": (
        "All that launch.py can be asked for, on a CPU",
        ["--no-default-groups", *EVERYWHERE],
    ),
    "requirements-gpu.txt": (
        "All that launch.py can be asked for, on NVIDIA GPUs (CUDA 13, Linux)",
        ["--no-default-groups", *EVERYWHERE, "--extra=cuda"],
    ),
}

# What must install from wheels alone: (what, system, extras).
TARGETS = [
    ("requirements.txt", "macos", []),
    ("requirements.txt", "windows", []),
    ("requirements.txt", "x86_64-manylinux_2_28", []),
    ("requirements.txt", "aarch64-manylinux_2_28", []),
    ("requirements-gpu.txt", "x86_64-manylinux_2_28", []),
    ("pyproject.toml", "x86_64-manylinux_2_31", ["--extra=tpu"]),
]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
SOURCE_ONLY = ["promise"]  # pure Python, needed by tensorflow-datasets


def main() -> None:
    """Writes the pins, or with `--check` compares them."""
    parser = argparse.ArgumentParser(description="Pin every dependency.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check = parser.parse_args().check

    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "pyproject.toml").write_text(
            pyproject if check else with_pins(pyproject, ""), "utf-8"
        )
        run_uv(project, "lock", "--quiet")
        files = pinned_files(project, pyproject)

        if not check:
            for name, text in files.items():
                (ROOT / name).write_text(text, "utf-8")
            return

        stale = [name for name, text in files.items() if read_or_empty(ROOT / name) != text]
        if stale:
            sys.exit(f"{', '.join(stale)}: not what the dependencies resolve to. Run: {REGENERATE}")
        for name in REQUIREMENTS:
            (project / name).write_text(files[name], "utf-8")
        for (what, system, extras), python in itertools.product(TARGETS, PYTHONS):
            check_installable(project, what, system, extras, python)


def pinned_files(project: Path, pyproject: str) -> dict[str, str]:
    """Returns the text of every file that holds pins, from the lock file in `project`."""
    everything = export(project, ["--all-extras", "--all-groups"])
    build = export(project, ["--only-group=build"])
    pins = toml_list("constraint-dependencies", everything)
    pins += toml_list("build-constraint-dependencies", build)
    files = {"pyproject.toml": with_pins(pyproject, pins)}
    for name, (purpose, options) in REQUIREMENTS.items():
        header = f"# {purpose}: pip install -r {name}\n# Written by: {REGENERATE}\n"
        files[name] = header + "\n".join(export(project, options)) + "\n"
    return files


def export(project: Path, options: list[str]) -> list[str]:
    """Returns the pins of a part of the lock file, as `name==version ; marker`."""
    lines = run_uv(
        project,
        "export",
        "--quiet",
        "--frozen",
        "--no-annotate",
        "--no-emit-project",
        "--no-hashes",
        "--no-header",
        *options,
    ).splitlines()
    for line in lines:
        if not PIN.fullmatch(line):
            raise ValueError(f"uv export {' '.join(options)}: {line!r} is not NAME==VERSION")
    if not lines:
        raise ValueError(f"uv export {' '.join(options)}: no packages")
    return lines


def check_installable(
    project: Path, what: str, system: str, extras: list[str], python: str
) -> None:
    """Ends the program unless `what` resolves on a system and a Python, from wheels."""
    command = ["pip", "compile", what, "--quiet", "--only-binary=:all:", *extras]
    command += [f"--no-binary={name}" for name in SOURCE_ONLY]
    command += [f"--python-platform={system}", f"--python-version={python}"]
    # All versions are given, so what uv has just read for the lock file mostly answers this, in
    # a third of a second. An index that lets nothing be cached makes it ten.
    if try_uv(project, *command, "--offline").returncode:
        run_uv(project, *command)
    print(f"{' '.join([what, *extras])} installs on {system}, Python {python}", flush=True)


def run_uv(project: Path, *args: str) -> str:
    """Runs uv in a folder and returns what it prints, or ends the program with its complaint."""
    done = try_uv(project, *args)
    if done.returncode:
        sys.exit(f"uv {' '.join(args)}\n{done.stderr}")
    return done.stdout


def try_uv(project: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs uv in a folder."""
    # A folder of local builds would turn `torch==2.13.0` into `torch==2.13.0+cpu`.
    env = {key: value for key, value in os.environ.items() if key != "UV_FIND_LINKS"}
    return subprocess.run(
        ["uv", *args], cwd=project, env=env, text=True, capture_output=True, check=False
    )


def with_pins(pyproject: str, pins: str) -> str:
    """Returns the text of pyproject.toml with other pins between the two marks."""
    before, _, rest = pyproject.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"pyproject.toml: no lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + pins + END + after


def toml_list(key: str, values: list[str]) -> str:
    """Returns `key = [...]`, one value a line."""
    return f"{key} = [\n" + "".join(f'    "{value}",\n' for value in values) + "]\n"


def read_or_empty(path: Path) -> str:
    """Returns the text of a file, or nothing where there is none."""
    return path.read_text("utf-8") if path.exists() else ""


if __name__ == "__main__":
    main()
