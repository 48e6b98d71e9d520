"""events.jsonl: it tells exactly what is on disk, whatever was killed, and never stops a run."""

import itertools
import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import text_run
from processes import finish, launch, write_config
from tiny_run import tiny_config, train_table

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.copying import copy_run
from jaxlm.checkpoints.entries import list_names
from jaxlm.checkpoints.folder import list_steps
from jaxlm.checkpoints.prune import prune
from jaxlm.config import CheckpointConfig, Config, OptimConfig
from jaxlm.tracking.events import NAME, Event, Events, checkpoints_left, read_events

LINE = {"time": "2026-01-31T23:59:59Z", "event": "save", "step": 4, "why": "", "checkpoint": "4"}


def events_of(run: Path, kind: str = "") -> list[Event]:
    found, unreadable = read_events(run / NAME)
    assert found and unreadable == []
    return [event for event in found if kind in ("", event["event"])]


def tells_the_disk(run: Path) -> bool:
    left = checkpoints_left(read_events(run / NAME)[0])
    return bool(left) and sorted(left) == list_names(run / "checkpoints")


class KilledError(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, when: int) -> None:
    """Ends the run at call number `when` of a function."""
    real: Callable[..., Any] = getattr(module, name)
    calls = itertools.count(1)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == when:
            raise KilledError
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, killed)


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How often each step was committed, counted where its manifest is written."""
    counted: Counter[int] = Counter()
    real = manifest.write_manifest

    def counting(partial: Path) -> None:
        real(partial)
        counted[int(partial.name.partition(".")[0])] += 1

    monkeypatch.setattr(manifest, "write_manifest", counting)
    yield counted


def saved_often(run_dir: Path, **changes: Any) -> Config:
    """A save at each step, few of which stay."""
    checkpoint = {"save_interval": 1, "keep_latest": 2}
    return tiny_config(run_dir, **({"num_steps": 9, "checkpoint": checkpoint} | changes))


def test_every_commit_is_told_and_what_became_of_it(tmp_path: Path, committed: Counter[int]):
    train_table(saved_often(tmp_path, num_steps=6))
    ruinous = OptimConfig(learning_rate=3.0, warmup_steps=2)
    train_table(saved_often(tmp_path, optim=ruinous))
    train_table(saved_often(tmp_path, resume="best"))
    assert tells_the_disk(tmp_path)
    assert Counter(event["step"] for event in events_of(tmp_path, "save")) == committed
    assert committed[7] == 2 and committed.total() == 12
    (back,) = events_of(tmp_path, "back")
    assert (back["step"], back["why"]) == (6, "from step 9: --resume best")
    assert [e["checkpoint"] for e in events_of(tmp_path, "set aside")] == [
        "8.superseded",
        "9.superseded",
    ]
    ends = [event["event"] for event in events_of(tmp_path) if event["event"] in ("start", "end")]
    assert ends == ["start", "end"] * 3
    deleted = events_of(tmp_path, "deletion")
    assert {event["why"] for event in deleted} == {"neither the best nor of the latest 2"}
    why = {event["step"]: event["why"] for event in events_of(tmp_path, "save")}
    assert why[1] == "interval" and why[3] == "interval, best" and why[9].endswith("final")


@pytest.mark.parametrize(
    "calls",
    [
        (6, 2),  # in a save, and at the start after it
        pytest.param((2, 4, 3), marks=pytest.mark.slow),
        pytest.param((7, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_what_a_kill_kept_from_being_told_is_found_at_the_next_start(
    tmp_path: Path, committed: Counter[int], monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...]
):
    num_killed, behind = 0, 0
    for when in calls:
        with monkeypatch.context() as patch:
            kill_at(patch, Events, "compare", when)
            try:
                train_table(saved_often(tmp_path))
            except KilledError:
                num_killed += 1
                behind += (tmp_path / NAME).exists() and not tells_the_disk(tmp_path)
        with (tmp_path / NAME).open("a") as file:
            file.write('{"time": "2026-01-')  # a kill in the middle of a line
    assert num_killed >= 2 and behind
    train_table(saved_often(tmp_path))
    assert tells_the_disk(tmp_path)
    assert Counter(event["step"] for event in events_of(tmp_path, "save")) == committed


@pytest.mark.slow
def test_damage_and_what_is_done_by_hand(own_home: Path):
    run = own_home / text_run.RUN
    assert tells_the_disk(run) and "sample" not in {e["event"] for e in events_of(run)}
    text_run.damage(run / "checkpoints" / "12")
    (run / "checkpoints" / "4").rename(own_home / "gone")
    assert text_run.launched(own_home, "--num_steps 16 --optim.learning_rate 3")[0] == 0
    assert tells_the_disk(run)
    (gone,), (aside,) = events_of(run, "deletion"), events_of(run, "set aside")
    assert (gone["checkpoint"], gone["why"]) == ("4", "found gone")
    assert aside["checkpoint"] == "12.corrupt" and "damaged: params/" in aside["why"]
    starts = events_of(run, "start")
    assert [event["step"] for event in starts] == [0, 8, 8]
    assert "optim.learning_rate: was 0.01, is 3" in starts[1]["why"]
    assert starts[-1].get("pid") == os.getpid()


def test_pruned_and_copied(own_home: Path, tmp_path: Path):
    run = own_home / text_run.RUN
    copy_run(str(run), str(tmp_path / "copy"))
    assert (tmp_path / "copy" / NAME).read_bytes() == (run / NAME).read_bytes()
    prune(str(run))
    assert tells_the_disk(run)
    assert events_of(run, "deletion")[-1]["why"] == "jaxlm checkpoints prune"
    (tmp_path / "copy" / NAME).unlink()
    prune(str(tmp_path / "copy" / "checkpoints"))
    assert not (tmp_path / "copy" / NAME).exists()


def test_a_run_from_before_there_were_events_is_found_as_it_is(own_home: Path):
    run = own_home / text_run.RUN
    (run / NAME).unlink()
    folder, events = run / "checkpoints", Events(run / NAME)
    with Checkpoints(folder, CheckpointConfig(), on_commit=print, events=events):
        assert tells_the_disk(run)
    assert text_run.launched(own_home, "--num_steps 16 --optim.learning_rate 3")[0] == 0
    assert tells_the_disk(run)
    found = {event["step"] for event in events_of(run) if event["why"] == "found on disk"}
    assert found == {4, 8, 12}


@pytest.mark.slow
def test_a_sample_is_an_event(own_home: Path):
    flags = "--num_steps 13 --optim.learning_rate 3 --sample_prompt 'an <b>end'"
    assert text_run.launched(own_home, flags)[0] == 0
    (sample,) = events_of(own_home / text_run.RUN, "sample")
    assert sample["step"] == text_run.BEST and sample.get("prompt") == "an <b>end"
    assert sample.get("text")


def test_a_run_that_fails_says_why_and_one_that_never_began_leaves_nothing(tmp_path: Path):
    def fail(step: int, row: dict[str, float]) -> None:
        raise RuntimeError(f"at {step}: \udcff\n")

    config = saved_often(tmp_path / "run")
    with pytest.raises(RuntimeError):
        train_table(config, callbacks=[fail])
    (failed,) = events_of(tmp_path / "run", "failed")
    assert failed["why"] == "RuntimeError: at 1: ?\n"
    config = saved_often(tmp_path / "never", branch_from=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no checkpoints"):
        train_table(config)
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_a_real_run_killed_again_and_again(tmp_path: Path):
    config, run = write_config(tmp_path), tmp_path / "run"
    for at in ((35, signal.SIGKILL), (75, signal.SIGKILL), (125, signal.SIGKILL)):
        finish(launch(config, run, "--checkpoint.keep_latest", "2", at=at), -signal.SIGKILL)
    finish(launch(config, run, "--checkpoint.keep_latest", "2", at=(165, signal.SIGTERM)), 75)
    assert tells_the_disk(run)
    assert len(events_of(run, "start")) == 4
    (stop,) = events_of(run, "stop")
    assert stop["why"] == "SIGTERM" and stop["step"] == max(list_steps(run / "checkpoints"))
    assert events_of(run, "save")[-1]["why"].endswith("stop")


# --- the file itself


def test_lines_that_are_no_events_are_told_and_passed_over(tmp_path: Path):
    path = tmp_path / NAME
    bad = ["", "nul", "[]", '{"time": 1}', json.dumps(LINE | {"step": "4"}), "[" * 5000]
    path.write_text("\n".join([json.dumps(LINE), *bad, json.dumps(LINE | {"more": 1})]) + '\n{"t')
    events, unreadable = read_events(path)
    assert [event["step"] for event in events] == [4, 4] and len(unreadable) == len(bad) + 1
    assert "line 2 is no event" in unreadable[0] and "cut its last line short" in unreadable[-1]
    Events(path).add("best", 5, "")
    assert [event["event"] for event in read_events(path)[0]] == ["save", "save", "best"]
    path.write_text("x\n" * 1000)
    with pytest.raises(ValueError, match="found more than 100 lines"):
        read_events(path)


@pytest.mark.parametrize("what", ["pipe", "folder", "no folder", "garbage"])
def test_a_file_that_cannot_be_had_stops_nothing(tmp_path: Path, what: str, lines: list[str]):
    path = tmp_path / NAME
    if what == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif what == "folder":
        path.mkdir()
    elif what == "garbage":
        path.write_text("x\n" * 1000)
    else:
        path = tmp_path / "none" / NAME
    events = Events(path)
    events.compare(["4"], {})
    events.add("end", 4, "")
    events.failed(RuntimeError, RuntimeError(), None)
    assert len(lines) == (what != "no folder")
    assert all("is not written down" in line and str(path) in line for line in lines)


def test_what_a_full_disk_refuses_comes_later(tmp_path: Path):
    path = tmp_path / NAME
    events = Events(path)
    events.add("save", 1, "", checkpoint="1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        events.add("save", 2, "", checkpoint="2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    found, unreadable = read_events(path)
    assert [event["step"] for event in found] == [1] and unreadable
    events.add("end", 2, "")
    assert [event["step"] for event in events_of(tmp_path)] == [1, 2, 2]
