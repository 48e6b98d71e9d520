import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proofs import restored

from jaxlm.config import Config, TrackingConfig
from jaxlm.tracking import metrics
from jaxlm.tracking.events import Events, read_events
from jaxlm.tracking.metrics import Metrics, perplexity, read_metrics
from jaxlm.tracking.rows import Rows

ROWS = [
    {"step": 10, "train/loss": 4.5, "train/tokens_seen": 40960},
    {"step": 20, "train/loss": math.nan, "train/perplexity": math.inf},
    {"step": 20, "eval/loss": 0.1 + 0.2, "eval/best_loss": -math.inf},
    {"step": 30, "train/loss": 4.25},
    {"step": 40, "train/loss": 4.125},
]


def start(
    run_dir: Path,
    *,
    run_id: str | None = "old",
    restored_step: int,
    settings_changed: bool = False,
    **options: Any,
) -> Metrics:
    return Metrics(
        Config(run_dir=str(run_dir)),
        run_id=run_id,
        restored=restored(run_dir, restored_step) if run_id else (0, Rows()),
        settings_changed=settings_changed,
        **options,
    )


def id_of_start(run_dir: Path, **options: Any) -> str:
    with start(run_dir, **options) as run:
        return run.run_id


def log_all(run: Metrics, rows: list[dict]) -> None:
    for row in rows:
        run.log(row["step"], {name: value for name, value in row.items() if name != "step"})


def write(run_dir: Path, rows: list[dict] = ROWS) -> Path:
    with start(run_dir, run_id=None, restored_step=0) as run:
        log_all(run, rows)
    return run_dir / "metrics.jsonl"


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def same(left: list[dict], right: list[dict]) -> bool:
    # repr tells floats apart to the last bit, and holds NaN equal to itself.
    return repr(left) == repr(right)


def test_rows_come_back_to_the_bit_and_any_json_parser_reads_them(tmp_path):
    path = write(tmp_path)
    assert same(read_metrics(path), ROWS)
    with pytest.raises(ValueError, match=f"^{path.parent}: not a file"):
        read_metrics(path.parent)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    with pytest.raises(ValueError, match="NaN"):  # the control: Python's own spelling is no JSON
        json.loads(json.dumps(math.nan), parse_constant=refuse)


def test_a_file_cut_short_at_any_byte_keeps_every_row_that_is_proven(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of starts
    path = write(tmp_path)
    content = path.read_bytes()
    proofs = {step: restored(tmp_path, step)[1] for step in (10, 20, 30, 40)}
    for size in range(len(content)):
        path.write_bytes(content[:size])
        # A row is whole with its closing brace; the newline may be missing.
        num_rows = content[:size].count(b"}")
        assert same(read_metrics(path), ROWS[:num_rows])
        lines.clear()
        with again(tmp_path, 40, proofs) as run:
            run.log(50, {"train/loss": 4.0})
        last = max((s for s in proofs if size >= proofs[s].num_bytes), default=0)
        kept = [row for row in ROWS if row["step"] <= last]
        assert same(read_metrics(path), [*kept, {"step": 50, "train/loss": 4.0}])
        assert f"the rows after step {last} up to step 40 are lost" in lines[0]
        assert run.rows.gaps == [[last, 40]] and "is not complete: it lacks" in lines[1]
        for aside in tmp_path.glob("metrics.jsonl.corrupt*"):
            assert aside.read_bytes() == content[:size]
            aside.unlink()


def again(run_dir: Path, step: int, proofs: dict[int, Rows]) -> Metrics:
    """A start from the checkpoint of this step, beside others."""
    return Metrics(
        Config(run_dir=str(run_dir)),
        run_id="old",
        restored=(step, proofs[step]),
        settings_changed=False,
        proofs=lambda: proofs,
    )


def test_every_flipped_bit_is_found_at_a_resume(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of starts
    path = write(tmp_path)
    content = path.read_bytes()
    proofs = {step: restored(tmp_path, step)[1] for step in (10, 20, 30, 40)}
    with again(tmp_path, 40, proofs):
        assert lines == [] and path.read_bytes() == content, "the control: nothing is wrong"
    for bit in range(0, 8 * len(content), 13):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        lines.clear()
        with again(tmp_path, 40, proofs):
            kept = read_metrics(path)
        sound = max((s for s in proofs if bit // 8 >= proofs[s].num_bytes), default=0)
        assert same(kept, [row for row in ROWS if row["step"] <= sound])
        assert f"the rows after step {sound} up to step 40 are lost" in lines[0]
        (aside,) = tmp_path.glob("metrics.jsonl.corrupt*")
        assert aside.read_bytes() == bytes(flipped)
        aside.unlink()


def _rotate(path: Path) -> None:
    path.rename(path.with_name("metrics.jsonl.1"))
    path.touch()


def _replace(path: Path) -> None:
    path.unlink()
    path.write_text("of another program\n")


def _append(path: Path) -> None:
    with path.open("a") as file:
        file.write("of another program\n")


@pytest.mark.parametrize(
    "harm", [_rotate, _replace, _append, Path.unlink, lambda path: shutil.rmtree(path.parent)]
)
def test_a_file_that_goes_under_the_run_is_written_anew(tmp_path, harm, lines):
    run_dir = tmp_path / "run"
    events = Events(tmp_path / "events.jsonl")
    with start(run_dir, run_id=None, restored_step=0, events=events) as run:
        log_all(run, ROWS[:3])
        run.flush()
        log_all(run, ROWS[3:4])
        harm(run_dir / "metrics.jsonl")
        log_all(run, ROWS[4:])
        rows = run.flush()
        assert same(read_metrics(run_dir / "metrics.jsonl"), ROWS)
    assert rows == restored(run_dir, 40)[1] and not rows.gaps
    assert len(lines) == 1 and "no row is lost" in lines[0], "told once, and at the first flush"
    (event,) = read_events(tmp_path / "events.jsonl")[0]
    assert (event["event"], event["step"]) == ("rows", 40)
    with start(run_dir, restored_step=40):  # a later start takes the folder
        assert same(read_metrics(run_dir / "metrics.jsonl"), ROWS)


def test_rows_changed_or_cut_under_the_run_are_a_gap(tmp_path, lines):
    for number, harm in enumerate((_flip, lambda path: os.truncate(path, 30))):
        run_dir = tmp_path / str(number)
        lines.clear()
        with start(run_dir, run_id=None, restored_step=0) as run:
            log_all(run, ROWS[:3])
            run.flush()
            harm(run_dir / "metrics.jsonl")
            log_all(run, ROWS[3:])
            assert run.flush().gaps == [[0, 20]]
        assert same(read_metrics(run_dir / "metrics.jsonl"), ROWS[3:])
        assert "the rows after step 0 up to step 20 are lost" in lines[0]
        assert "it lacks the rows after step 0 up to step 20" in lines[1], "and at the end"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize("line", ["", "[]", "3", '{"loss": 1}', '{"step": 1.5}', "[" * 100_000])
def test_a_bad_line_in_the_middle_is_named(tmp_path, line):
    path = write(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*then start again"):
        start(tmp_path, run_id=None, restored_step=0)
    path.write_text("\n".join([lines[0], lines[1], line]))
    assert steps_of(path) == [10, 20]


@pytest.mark.parametrize(
    "restored_step, kept", [(0, 0), (9, 0), (10, 1), (20, 3), (39, 4), (99, 5)]
)
def test_rows_after_the_restored_step_are_cut(tmp_path, restored_step, kept):
    path = write(tmp_path)
    with start(tmp_path, restored_step=restored_step):
        assert same(read_metrics(path), ROWS[:kept])


def test_a_start_from_scratch_cuts_the_rows_of_step_0_too(tmp_path):
    path = write(tmp_path, [{"step": 0, "eval/loss": 9.0}, *ROWS])
    assert steps_of(path)[0] == 0
    with start(tmp_path, run_id=None, restored_step=0):
        assert read_metrics(path) == []


def test_a_cut_that_is_broken_off_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write(tmp_path)

    replace = Path.replace

    def killed(source: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, restored_step=20)
    assert same(read_metrics(path), ROWS)


def test_every_row_logged_survives_kill_9(tmp_path):
    child = f"""
import os
from jaxlm.config import Config
from jaxlm.tracking.metrics import Metrics
from jaxlm.tracking.rows import Rows
run = Metrics(Config(run_dir={str(tmp_path)!r}), run_id=None, restored=(0, Rows()),
              settings_changed=False)
for step in range(1, 101):
    run.log(step, {{"train/loss": 1 / step}})
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", child], check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(tmp_path / "metrics.jsonl") == list(range(1, 101))


def test_flush_brings_the_file_to_the_disk(tmp_path, monkeypatch):
    synced = []
    with start(tmp_path, run_id=None, restored_step=0) as run:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
        run.log(1, {"train/loss": 1.0})
        assert synced == []
        run.flush()
        assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]


def test_a_start_from_scratch_gets_an_id_of_its_own(tmp_path):
    ids = {id_of_start(tmp_path, run_id=None, restored_step=0) for _ in range(3)}
    assert len(ids) == 3 and all(ids)


def test_the_id_of_the_checkpoint_counts_where_the_run_folder_is_gone(tmp_path):
    assert id_of_start(tmp_path / "elsewhere", run_id="abc", restored_step=20) == "abc"


@pytest.mark.parametrize(
    "tracking, package, extra",
    [
        (TrackingConfig(wandb="offline"), "wandb", "wandb"),
        (TrackingConfig(tensorboard=True), "tensorboardX", "tensorboard"),
    ],
)
def test_a_missing_package_is_found_before_anything_is_touched(
    tmp_path, monkeypatch, tracking, package, extra
):
    path = write(tmp_path)
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, package, None)
    config = Config(run_dir=str(tmp_path), tracking=tracking)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]'"):
        Metrics(config, run_id="a", restored=(10, Rows()), settings_changed=False)
    assert path.read_bytes() == before


def test_trackers_that_are_off_are_never_imported(tmp_path):
    child = f"""
import sys
from jaxlm.config import Config
from jaxlm.tracking.metrics import Metrics
from jaxlm.tracking.rows import Rows
config = Config(run_dir={str(tmp_path)!r})
Metrics(config, run_id=None, restored=(0, Rows()), settings_changed=False)
assert "jaxlm.tracking.metrics" in sys.modules
assert not {{"wandb", "tensorboardX", "jax"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", child], check=True)


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))
    assert metrics.perplexity(math.log(119.9)) == pytest.approx(119.9)


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    # A write past the limit takes in a part, and the next one fails, as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [0, 1, 70, 130, 1000])
def test_rows_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path, num_bytes):
    with start(tmp_path, run_id=None, restored_step=0) as run:
        with room_for(num_bytes):
            log_all(run, ROWS[:3])
            if num_bytes < 200:
                with pytest.raises(OSError, match="too large"):
                    run.flush()
                assert (tmp_path / "metrics.jsonl").stat().st_size == num_bytes
        run.log(30, {"train/loss": 4.25})
        assert same(read_metrics(tmp_path / "metrics.jsonl"), ROWS[:4])
    assert same(read_metrics(tmp_path / "metrics.jsonl"), ROWS[:4])


def test_rows_that_are_never_written_fail_a_run_but_hide_no_error_of_its_own(tmp_path):
    for error, expected in ((None, OSError), (KeyError("own"), KeyError)):
        with (
            room_for(0),
            pytest.raises(expected),
            start(tmp_path, run_id=None, restored_step=0) as run,
        ):
            log_all(run, ROWS)
            if error:
                raise error
