"""The short version of tests/chaos.py, and proof that it would notice."""

import os
import re
import subprocess
import sys

import pytest
import text_run


def chaos(*flags: str, code: int = 0) -> str:
    """What tests/chaos.py prints, in a process of its own: it forks, and has one device."""
    found = subprocess.run(
        [sys.executable, str(text_run.REPO / "tests" / "chaos.py"), *flags],
        env={**os.environ, "PYTHONPATH": f"{text_run.REPO}:{text_run.REPO / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout


def table(said: str) -> dict[str, tuple[int, int]]:
    """Phase -> how often it was aimed at, and how often it was hit."""
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \|$", said, re.M)
    return {phase: (int(aimed), int(hit)) for phase, aimed, hit in rows}


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_phases_ends_with_the_same_bits():
    said = chaos("--kills", "12", "--seed", "1")
    found = table(said)
    assert sum(hit for _, hit in found.values()) >= 12
    assert len(found) >= 11 and sum(hit > 0 for _, hit in found.values()) >= 7
    assert [phase for phase, (aimed, hit) in found.items() if not aimed + hit] == []
    assert said.rstrip().endswith(" 0 differences")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_signals_one_and_two_in_a_row(name: str):
    said = chaos("--signal", name, "--kills", "6", "--seed", "2")
    assert sum(hit for _, hit in table(said).values()) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "told"),
    [
        ("batches", r"step \d+: batch, rows 0:8: \w+ uninterrupted, \w+ \w+ resumed"),
        ("metrics", r"step \d+: \S+: (\S+) uninterrupted, \1 \1 resumed"),
    ],
)
def test_a_resume_that_goes_wrong_is_noticed(sabotage: str, told: str):
    said = chaos("--sabotage", sabotage, "--kills", "2", code=1)
    assert re.search(told, said), said
