import html
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import proofs
import pytest
import text_run

from jaxlm.config import Config, OptimConfig, TrackingConfig, to_dict
from jaxlm.report import page as report_page
from jaxlm.tracking.metrics import Metrics, read_metrics
from jaxlm.tracking.rows import Rows
from jaxlm.tracking.trackers import Trackers

needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="no wandb")
needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboardX"), reason="no tensorboardX"
)

# Its own process: wandb keeps a service running to the end of the process that it began in.
RUN = """
import os, pathlib, signal, sys
import proofs
from jaxlm.config import Config, TrackingConfig
from jaxlm.tracking.metrics import Metrics

run_dir, restored, last, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = Config(run_dir=run_dir, eval_interval=50, tracking=TrackingConfig(wandb="offline"))
ours = lambda *_: None
signal.signal(signal.SIGTERM, ours)
hooks = sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT)
run = Metrics(config, run_id="abc" if restored else None, settings_changed=False,
              restored=proofs.restored(pathlib.Path(run_dir), restored))
with run:
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"  # else it asks the name server
    assert hooks == (sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT))
    assert signal.getsignal(signal.SIGTERM) is ours
    for step in range(restored + 1, last + 1):
        run.log(step, {"train/loss": 1 / step, "train/grad_norm": float("nan")})
        if step % 50 == 0:
            run.log(step, {"eval/loss": 2 / step, "eval/best_loss": float("inf")})
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run_child(run_dir: Path, restored: int, last: int, how: str) -> None:
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(run_dir), str(restored), str(last), how],
        env={k: v for k, v in os.environ.items() if k[:5] != "WANDB"}
        | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0), done.stderr
    assert done.stdout + done.stderr == ""
    # Outside the run folder there is only the log of wandb's service.
    stray = [path for path in home.rglob("*") if path.is_file()]
    assert all(home / ".cache/wandb/logs" in path.parents for path in stray)


def merged(rows: list[dict]) -> dict[int, dict]:
    """The rows of each step as one, which is what W&B keeps."""
    steps = {}
    for row in rows:
        floats = {name: float(value) for name, value in row.items() if name != "step"}
        steps.setdefault(row["step"], {"step": row["step"]}).update(floats)
    return steps


def same(left: object, right: object) -> bool:
    return repr(left) == repr(right)  # NaN equals itself, and floats differ by the last bit


def wandb_folders(run_dir: Path) -> list[Path]:
    """The offline folders, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def read_wandb(folder: Path) -> tuple[list[dict], dict]:
    """Rows and config in an offline folder: LevelDB's log format, after 7 bytes.

    A page is in its row as the file that it names.
    """
    from wandb.proto import wandb_internal_pb2

    data = next(folder.glob("*.wandb")).read_bytes()
    rows, config, parts, at = [], {}, [], 7
    while True:
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        if at + 7 > len(data):
            return rows, config
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4) and at <= len(data):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []
            if record.WhichOneof("record_type") == "history":
                row = {}
                for item in record.history.item:
                    name, *inside = [item.key] if item.key else item.nested_key
                    value = json.loads(item.value_json)
                    if inside == ["path"]:  # of a page
                        row[name] = folder / "files" / value
                    elif not inside:
                        row[name] = value
                step = row.pop("_step")
                rows.append({"step": step, **{k: v for k, v in row.items() if k[0] != "_"}})
            for item in record.config.update:
                config[item.key] = json.loads(item.value_json)


def without_texts(rows: list[dict]) -> list[dict]:
    kept = [{k: v for k, v in row.items() if not isinstance(v, str | Path)} for row in rows]
    return [row for row in kept if len(row) > 1]


def is_whole(folder: Path, run_dir: Path) -> bool:
    found = without_texts(read_wandb(folder)[0])
    expected = merged(read_metrics(run_dir / "metrics.jsonl"))
    assert len(found) == len(merged(found))
    return same(
        [sorted(row.items()) for row in merged(found).values()],
        [sorted(row.items()) for row in expected.values()],
    )


@pytest.mark.slow
@needs_wandb
def test_the_newest_offline_folder_is_whole_after_kill_9_and_other_starts(tmp_path):
    run_dir = tmp_path / "run"
    run_child(run_dir, 0, 730, "kill")
    killed = wandb_folders(run_dir)
    assert len(killed) == 1 and not is_whole(killed[0], run_dir)  # else this test proves nothing
    run_child(run_dir, 500, 1000, "end")
    folders = wandb_folders(run_dir)
    assert len(folders) == 2 and is_whole(folders[-1], run_dir)
    assert [row["step"] for row in read_wandb(folders[-1])[0]] == list(range(1, 1001))
    run_child(run_dir, 1000, 1000, "end")
    folder = wandb_folders(run_dir)[-1]
    expected = Config(
        run_dir=str(run_dir), eval_interval=50, tracking=TrackingConfig(wandb="offline")
    )
    config = read_wandb(folder)[1]
    assert {name: config[name] for name in to_dict(expected)} == to_dict(expected)
    assert is_whole(folder, run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "train/loss": 1.0}\n')
    assert not is_whole(folder, run_dir)  # the control: one row more is seen


class Server:
    """What wandb's server does with a run, as far as it matters here."""

    def __init__(self, monkeypatch):
        self.runs: dict[str, dict[int, dict]] = {}
        self.dropped: list[int] = []
        self.mode = "online"
        module = types.ModuleType("wandb")
        module.init = self.init
        module.Settings = lambda **_: None
        module.Html = lambda page, **_: page
        monkeypatch.setitem(sys.modules, "wandb", module)

    def init(self, *, id: str, resume: str | None, mode: str, **_: object) -> types.SimpleNamespace:
        assert (resume, mode) == ("allow" if self.mode == "online" else None, self.mode)
        rows = self.runs.setdefault(id, {})

        def log(row: dict, step: int, commit: bool) -> None:
            assert commit
            if step > max(rows, default=-1):
                rows[step] = dict(row)
            else:
                self.dropped.append(step)

        return types.SimpleNamespace(
            step=max(rows, default=-1) + 1,
            log=log,
            finish=lambda exit_code=0: None,
            url="u",
            config=types.SimpleNamespace(update=lambda config, allow_val_change: None),
        )


ONLINE = TrackingConfig(wandb="online")


def online(run_dir: Path, tracking: TrackingConfig = ONLINE, **options) -> Metrics:
    config = Config(
        run_dir=str(run_dir),
        num_steps=100,
        eval_interval=20,
        optim=OptimConfig(warmup_steps=10),
        tracking=tracking,
    )
    return start(config, **options)


def start(config: Config, run_id: str | None = "abc", restored_step: int = 0, **options) -> Metrics:
    at = proofs.restored(Path(config.run_dir), restored_step) if restored_step else (0, Rows())
    return Metrics(config, run_id=run_id, restored=at, **{"settings_changed": False, **options})


def id_of_start(run_dir: Path, **options) -> str:
    with online(run_dir, **options) as run:
        return run.run_id


def as_server(run_dir: Path) -> dict[int, dict]:
    rows = merged(read_metrics(run_dir / "metrics.jsonl"))
    return {step: {k: v for k, v in row.items() if k != "step"} for step, row in rows.items()}


def train(run: Metrics, first: int, last: int, *, evals: bool = True, scale: float = 1) -> None:
    for step in range(first, last + 1, 10):
        run.log(step, {"train/loss": scale / step})
        if evals and step % 20 == 0:
            run.log(step, {"eval/loss": scale * 2 / step})


def test_online_gets_the_rows_that_it_lacks_and_none_twice(tmp_path, monkeypatch):
    server = Server(monkeypatch)
    with online(tmp_path, run_id=None) as run:
        run_id = run.run_id
        train(run, 10, 70)
    for step in (50, 60, 70):  # the kill took them before they were sent
        del server.runs[run_id][step]
    with online(tmp_path, run_id=run_id, restored_step=60) as run:
        train(run, 70, 100)
    assert server.runs == {run_id: as_server(tmp_path)}
    assert list(server.runs[run_id]) == list(range(10, 101, 10))
    assert server.dropped == []


def test_online_is_ahead_of_the_checkpoint_after_a_kill(tmp_path, monkeypatch):
    server = Server(monkeypatch)
    with online(tmp_path, run_id=None) as run:
        train(run, 10, 70)
    with online(tmp_path, run_id=run.run_id, restored_step=40) as run:
        train(run, 50, 100)
    assert server.runs == {run.run_id: as_server(tmp_path)}
    assert server.dropped == [50, 60, 70]  # made again to the bit, so no loss


def test_an_eval_made_only_after_a_restart_is_not_dropped_online(tmp_path, monkeypatch):
    server = Server(monkeypatch)
    with online(tmp_path, run_id=None) as run:
        train(run, 10, 30)
        run.log(40, {"train/loss": 0.5})  # stopped before the eval of step 40
    assert list(server.runs[run.run_id]) == [10, 20, 30]
    with online(tmp_path, run_id=run.run_id, restored_step=40) as run:
        run.log(40, {"eval/loss": 0.25})
        train(run, 50, 100)
    assert server.runs == {run.run_id: as_server(tmp_path)}
    assert server.runs[run.run_id][40] == {"train/loss": 0.5, "eval/loss": 0.25}


def test_the_row_at_which_a_run_broke_off_is_sent(tmp_path, monkeypatch):
    server = Server(monkeypatch)
    with pytest.raises(RuntimeError), online(tmp_path, run_id=None) as run:
        train(run, 10, 70)
        raise RuntimeError
    assert 70 in server.runs[run.run_id]


def test_rows_taken_back_go_on_in_a_new_run(tmp_path, monkeypatch):
    server = Server(monkeypatch)
    with online(tmp_path, run_id=None) as run:
        train(run, 10, 70)
    old = run.run_id
    before = dict(server.runs[old])
    # A start that is killed before it logs: the rows are gone from here, and not from W&B.
    assert id_of_start(tmp_path, run_id=old, restored_step=40) == old
    with online(tmp_path, run_id=old, restored_step=40, settings_changed=True) as run:
        train(run, 50, 60, scale=2)
    between = run.run_id
    # Killed before the next checkpoint, which would have named the new run.
    with online(tmp_path, run_id=old, restored_step=40, settings_changed=True) as run:
        train(run, 50, 100, scale=3)
    assert len({old, between, run.run_id}) == 3
    assert server.runs[old] == before and server.runs[run.run_id] == as_server(tmp_path)
    assert server.dropped == []


@pytest.mark.parametrize("where", ["online", "offline", "off"])
def test_a_new_future_keeps_the_run_only_where_the_server_is_not_ahead(
    tmp_path, monkeypatch, where
):
    server = Server(monkeypatch)
    with online(tmp_path, run_id=None) as run:
        train(run, 10, 40)
    old = run.run_id
    if where == "online":
        assert id_of_start(tmp_path, run_id=old, restored_step=40, settings_changed=True) == old
        assert list(server.runs) == [old]
    else:
        server.mode = where
        options = {"run_id": old, "restored_step": 40, "tracking": TrackingConfig(wandb=where)}
        assert id_of_start(tmp_path, **options) == old
        assert id_of_start(tmp_path, **options, settings_changed=True) != old


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path, monkeypatch, lines):
    logged = []
    server = Server(monkeypatch)
    config = Config(run_dir=str(tmp_path), tracking=ONLINE)
    trackers = Trackers(config, [], run_id="abc")
    trackers._open("Good", lambda: types.SimpleNamespace(log=lambda *row: logged.append(row)))

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection lost")

    trackers._trackers["W&B"]._run.log = fail
    for step in (1, 2, 3):
        trackers.log(step, {"train/loss": 1.0})
    assert lines == [
        "W&B: u",
        "W&B failed; the run goes on without it (ConnectionResetError: Connection lost)",
    ]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert server.runs == {"abc": {}}
    trackers._open("Bad", fail)  # one that cannot even be opened
    trackers._open("Worse", sys.exit)
    assert lines[2].startswith("Bad failed; the run goes on")
    assert lines[3].startswith("Worse failed; the run goes on")


def test_an_interrupt_is_not_mistaken_for_a_failure(tmp_path):
    def interrupted() -> None:
        raise KeyboardInterrupt

    trackers = Trackers(Config(run_dir=str(tmp_path)), [])
    with pytest.raises(KeyboardInterrupt):
        trackers._open("Slow", interrupted)


def read_tensorboard(folder: Path) -> list[dict]:
    """Every event in the folder, in the order of the file names, as TensorBoard reads them."""
    from tensorboardX.proto import event_pb2

    rows = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.summary.value:
                values = {
                    value.tag: value.tensor.string_val[0].decode()
                    if value.HasField("tensor")
                    else value.simple_value
                    for value in event.summary.value
                }
                rows.append({"step": event.step, **values})
    return rows


def as_float32(rows: list[dict]) -> list[dict]:
    def narrow(value: float) -> float:
        return struct.unpack("f", struct.pack("f", value))[0]

    return [{k: v if k == "step" else narrow(v) for k, v in row.items()} for row in rows]


def with_tensorboard(run_dir: Path, **options) -> Metrics:
    config = Config(run_dir=str(run_dir), tracking=TrackingConfig(tensorboard=True))
    return start(config, **options)


@needs_tensorboard
def test_the_tensorboard_folder_is_one_curve_after_any_number_of_starts(tmp_path):
    folder = tmp_path / "tensorboard"
    # All starts within a second; after a kill there is no close.
    for restored_step, last in ((0, 70), (40, 60), (40, 90), (80, 100)):
        run = with_tensorboard(tmp_path, restored_step=restored_step)
        train(run, restored_step + 10, last)
        run.log(last, {"train/grad_norm": math.nan})
        expected = as_float32(read_metrics(tmp_path / "metrics.jsonl"))
        assert same(read_tensorboard(folder), expected) and len(expected) > 5
        run.__exit__(None)
    assert not same(read_tensorboard(folder), expected[:-1])  # the control


@needs_tensorboard
def test_files_of_others_in_the_tensorboard_folder_stay(tmp_path):
    theirs = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    theirs.parent.mkdir()
    theirs.touch()
    for _ in range(2):
        with with_tensorboard(tmp_path):
            pass
    assert theirs.exists() and len(list(theirs.parent.iterdir())) == 2


@needs_tensorboard
def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path, lines):
    (tmp_path / "tensorboard").touch()
    with with_tensorboard(tmp_path) as run:
        train(run, 10, 50)
    (line,) = lines
    assert line.startswith("TensorBoard failed; the run goes on without it")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 7


SHOWN = "--run_dir runs/shown --sample_prompt 'the <b>' --tracking.wandb online"


@pytest.mark.slow
@needs_tensorboard
def test_the_sample_and_the_report_of_a_finished_run_are_shown(own_home, monkeypatch):
    server = Server(monkeypatch)
    code, said = text_run.launched(own_home, f"{SHOWN} --tracking.tensorboard")
    assert code == 0 and "failed" not in said
    shown = read_tensorboard(own_home / "runs/shown/tensorboard")[-1]
    assert shown["step"] == 8 and f"sample: {shown['sample/text_summary']}\n" in said
    assert list(shown) == ["step", "sample/text_summary"]  # TensorBoard has no place for a page
    ((run_id, rows),) = server.runs.items()
    page = rows[8].pop("report")
    assert page.startswith("<!doctype html>") and "runs/shown" in page
    escaped = html.escape(shown["sample/text_summary"])
    assert rows[8].pop("sample") == f'<pre style="white-space: pre-wrap">{escaped}</pre>'
    assert rows == as_server(own_home / "runs/shown")
    monkeypatch.setattr(report_page, "read_history", lambda run: {}["a bug"])
    code, said = text_run.launched(own_home, f"{SHOWN} --num_steps 12")
    assert code == 0 and "report failed; the run goes on without it (KeyError: 'a bug')" in said
    longer = max(server.runs.values(), key=len)
    assert 12 in longer and "eval/loss" in longer[12] and "sample" in longer[12]


# The real command, but for two spoilt batches, and a kill at the first row of a step.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from jaxlm import launch
from jaxlm.data.batches import TrainBatches
from jaxlm.device import guard
from jaxlm.tracking.metrics import Metrics

guard.WINDOW = 4
at, saved, *flags = sys.argv[1:]
right, log = TrainBatches.__call__, Metrics.log

def spoilt(self, index, rows):
    batch = right(self, index, rows)
    if index in (13, 14):  # a byte that is in no text
        batch |= {"targets": np.ones_like(batch["targets"])}
    return batch

def killed(self, step, row):
    log(self, step, row)
    if step == int(at):
        while not Path("runs/curve/checkpoints", saved).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

TrainBatches.__call__, Metrics.log = spoilt, killed
launch.leave(launch.run_main(lambda: launch.main(flags)))
"""
FLAGS = "--config configs/tiny.py --run_dir runs/curve --num_steps 24 --log_interval 1"
FLAGS += " --eval_interval 6 --save_interval 2 --guard.outlier_zscore 8"
FLAGS += " --tracking.wandb offline --tracking.tensorboard --sample_prompt 'the <b>'"


def killed_at(home: Path, step: int, saved: int) -> tuple[int, str]:
    """Exit code and output of the command that is killed at a step, once `saved` is on disk."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(step), str(saved), *shlex.split(FLAGS)],
        cwd=home,
        env=clean | {"PYTHONPATH": str(text_run.REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@needs_wandb
@needs_tensorboard
def test_a_real_run_is_one_curve_in_both_after_kills_and_resumes(own_home):
    run_dir = own_home / "runs" / "curve"
    newest, folder = run_dir / "wandb" / "latest-run", run_dir / "tensorboard"

    def whole() -> list[bool]:
        expected = as_float32(read_metrics(run_dir / "metrics.jsonl"))
        in_tensorboard = same(without_texts(read_tensorboard(folder)), expected)
        return [is_whole(newest, run_dir), in_tensorboard]

    # Among the spoilt batches, which are not applied, and after them.
    for step, saved, told in ((14, 12, "run runs"), (18, 16, "Resuming from step 12")):
        code, said = killed_at(own_home, step, saved)
        assert code == -signal.SIGKILL and told in said, said
        assert whole() == [False, True]  # the row of a step goes to W&B with the next one
    assert said.count("Resuming from step 12") == 1, said
    code, said = killed_at(own_home, -1, 0)
    assert code == 0, said
    assert whole() == [True, True]
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 25))
    assert len(wandb_folders(run_dir)) == 3  # one for each start
    last = read_wandb(newest)[0][-1]
    assert last["step"] == 24 and "the &lt;b&gt;" in last["sample"].read_text()
    assert last["report"].read_text().startswith("<!doctype html>")
    assert read_tensorboard(folder)[-1]["sample/text_summary"].startswith("the <b>")
    # The controls: one bit of one value, and a file that another start left.
    path = run_dir / "metrics.jsonl"
    text = path.read_text()
    loss = rows[-1]["eval/loss"]
    path.write_text(text.replace(repr(loss), repr(loss * (1 + 1e-6))))
    assert whole() == [False, False]
    path.write_text(text)
    (event_file,) = folder.iterdir()
    shutil.copy(event_file, folder / "events.out.tfevents.0.left.jaxlm")
    assert whole() == [True, False]
