"""Runs on disks and clocks that fail; tests/shim.c and tests/faulty_disk.py make the faults."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, finish, launch, wait_for_step, write_config

from jaxlm.checkpoints.folder import list_steps, select
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints

pytestmark = pytest.mark.slow
FAKETIME = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler, cc")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = str(Path(__file__).with_name("shim.c"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def test_every_fault_of_the_disk(shim: str) -> None:
    private = ["unshare", "--mount"]
    if subprocess.run([*private, "true"], capture_output=True).returncode:
        private = []  # what needs a mount is skipped there, and says so
    args = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
        str(Path(__file__).with_name("faulty_disk.py")),
    ]
    # So many failed saves would hold an ordinary exit for minutes.
    code = f"import pytest; from jaxlm.launch import leave; leave(pytest.main({args}))"
    result = subprocess.run(
        [*private, sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": shim, "FAULT": "none"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    print(result.stdout)


def test_what_a_person_sees_of_a_disk_that_fails(
    config_file: Path, tmp_path: Path, shim: str
) -> None:
    fault = {"LD_PRELOAD": shim, "FAULT": f"write 28 {tmp_path}/*/20.orbax*/params* 0 99999 0"}
    process = launch(config_file, tmp_path, **fault)
    output = finish(process, 1, timeout_s=60)  # and does not wait for what never comes
    assert output.rstrip().splitlines()[-1].startswith("error: saving step 20 failed: ")
    assert "No space left on device" in output and "launch.py" not in output


@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime (Debian's faketime)")
def test_a_clock_that_jumps(config_file: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+365d")
    fake = {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    whole, jumping = tmp_path / "whole", tmp_path / "jumping"
    finish(launch(config_file, whole, "--num_steps", "100"), 0)
    process = launch(config_file, jumping, "--num_steps", "100", **fake)
    for step, jump in ((20, "-365d"), (60, "+365d")):
        wait_for_step(jumping, step, process)
        clock.write_text(jump)
    output, _ = process.communicate(timeout=300)
    if process.returncode:  # to Orbax, a save during which the clock went forward took a year
        assert "failed: ChainedFuture" in output.splitlines()[-1], output
        finish(launch(config_file, jumping, "--num_steps", "100", **fake), 0)
    written = json.loads((jumping / "checkpoints/100/_CHECKPOINT_METADATA").read_text())
    ago_s = time.time() - written["commit_timestamp_nsecs"] / 1e9
    assert abs(ago_s) > 300 * 86400, "the clock did not jump"
    assert diff_checkpoints(f"{jumping}@100", f"{whole}@100") == []
    assert untimed_rows(jumping) == untimed_rows(whole)
    assert list_steps(jumping / "checkpoints") == list_steps(whole / "checkpoints")
    assert select(f"{jumping}@best").step == select(f"{whole}@best").step
