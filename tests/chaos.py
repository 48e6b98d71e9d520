"""Kills the real launch command again and again, and compares with an uninterrupted run.

    python tests/chaos.py --kills 200 --seed 0

A kill is aimed at a phase, which is seen in the folders (or at a random instant, `--plan random`),
and counted under the phase that the folders show once the process is dead. Most starts are forked
from this process, which has imported what they import and started no JAX backend; every tenth is
the plain command line. Exit code 0: no bit differs, and no phase was missed.
"""

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when JAX is imported: one device, and compiled programs that outlive a kill.
os.environ.pop("XLA_FLAGS", None)
os.environ.pop("NPROC", None)
HOME = Path(tempfile.mkdtemp(prefix="chaos-"))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(HOME / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import text_run  # noqa: E402

import jaxlm.training.start  # noqa: E402
from jaxlm import launch, train  # noqa: E402, F401 - all that a start imports
from jaxlm.checkpoints.entries import CORRUPT  # noqa: E402
from jaxlm.checkpoints.folder import list_steps, scan_folder  # noqa: E402
from jaxlm.checkpoints.manifest import find_damage  # noqa: E402
from jaxlm.config import Config  # noqa: E402
from jaxlm.data.batches import TrainBatches  # noqa: E402
from jaxlm.data.dataset import MANIFEST  # noqa: E402
from jaxlm.proof.attempt import Attempt, Kill, Process, compare_runs  # noqa: E402
from jaxlm.tracking.rows import Rows  # noqa: E402
from jaxlm.training import preflight  # noqa: E402, F401 - all that a start imports

NUM_STEPS, EVAL_INTERVAL = 80, 10
CONFIG = f"""
from jaxlm.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(vocab_size=300, num_layers=2, d_model=32, d_ff=64, num_heads=2,
                      num_kv_heads=2, head_dim=16),
    data=DataConfig(source="text:{HOME}/texts/*.txt", eval_tokens=3000),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=3),
    checkpoint=CheckpointConfig(save_interval=4, keep_latest=2, keep_every=20),
    num_steps={NUM_STEPS}, batch_size=8, seq_len=128, eval_interval={EVAL_INTERVAL}, log_interval=1,
)
"""
# Where a start begins, what it does on the way, and what it does seldom.
PHASES = ("preparing", "compile", "restore", "setting aside")
PHASES += ("step", "eval", "array write", "manifest", "commit", "deletion", "replacing")
# Those that are over in a moment are struck at once.
DELAY_S = {"preparing": 0.05, "compile": 0.2, "restore": 0.2, "step": 0.005, "array write": 0.01}
TAKEN = "finishing this step"
MOST_KILLS = 25
"""Of one run, so that it comes to its end."""


def eval_due(step: int) -> bool:
    return step > 0 and step % EVAL_INTERVAL == 0  # of this config, as in `TrainSetup.eval_due`


class Watched(Attempt):
    """A start of a run of this config, whose phase is told more closely."""

    def __init__(self, run_dir: Path, start: Callable[[], Process]):
        self.resumed = bool(list_steps(run_dir / "checkpoints"))
        self.data = cache_of(run_dir) / "data"
        super().__init__(run_dir, start)

    def phase(self) -> str:
        names = names_in(self.checkpoints)
        if not self.is_new(self.run_dir / "config.json"):
            return self._phase_of_start(names)
        if any(name.endswith(".replaced") for name in names):
            return "replacing"
        for name in names:
            if ".orbax-checkpoint-tmp" in name and self.is_new(self.checkpoints / name):
                inside = names_in(self.checkpoints / name)
                if "commit_success.txt" in inside:
                    return "commit"
                return "manifest" if any("manifest.json" in n for n in inside) else "array write"
        if names_in(self.checkpoints / "deleting"):
            return "deletion"
        newest = self.checkpoints / str(max((int(n) for n in names if n.isdigit()), default=None))
        if self.is_new(newest) and changed(newest) > changed(self.run_dir / "metrics.jsonl"):
            return "commit"  # nothing was logged since the rename
        last = self._last_row()
        return "eval" if "eval/loss" in last or eval_due(last["step"]) else "step"

    def last_step(self) -> int:
        return self._last_row()["step"]

    def _last_row(self) -> dict[str, Any]:
        # Of the last whole line alone: this is asked for a thousand times a second.
        try:
            end = (self.run_dir / "metrics.jsonl").read_bytes()[-2000:]
        except FileNotFoundError:
            return {"step": 0}
        lines = end[: end.rfind(b"\n") + 1].splitlines()
        return json.loads(lines[-1]) if lines else {"step": 0}

    def _phase_of_start(self, names: list[str]) -> str:
        for lock in self.data.glob("*.lock"):
            if self.is_new(lock) and not (lock.with_suffix("") / MANIFEST).exists():
                return "preparing"
        if any(CORRUPT in name and self.is_new(self.checkpoints / name) for name in names):
            return "setting aside"
        if self.resumed and self.is_new(self.checkpoints / "holder.json"):
            return "restore"
        # A dataset is touched when it is opened; then the step is compiled.
        opened = any(map(self.is_new, self.data.glob(f"*/{MANIFEST}")))
        return "compile" if opened and not self.resumed else "starting"


def names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def changed(path: Path) -> int:
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return 0


def cache_of(run_dir: Path) -> Path:
    return Path(f"{run_dir}.cache")


class Forked:
    """A process that runs a function, with the start of Python left out."""

    def __init__(self, function: Callable[[], int], log: Path):
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = function()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _reap(self, options: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        code = self._reap(0)
        assert code is not None
        return code

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def sabotage_metrics() -> None:
    """Rows after the restored step are left in."""
    metrics = jaxlm.training.start.Metrics

    def keeps_all(config: Config, *, restored: tuple[int, Rows], **rest: Any) -> Any:
        path = Path(config.run_dir) / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        return metrics(config, restored=(restored[0], Rows().then(content)), **rest)

    jaxlm.training.start.Metrics = keeps_all


def sabotage_batches() -> None:
    """Each batch is the next one."""
    right = TrainBatches.__call__
    TrainBatches.__call__ = lambda self, index, rows: right(self, index + 1, rows)


SABOTAGES = {"metrics": sabotage_metrics, "batches": sabotage_batches}
"""Applied to starts that resume."""


class Chaos:
    """Runs that are broken, and what is counted on the way."""

    def __init__(self, seed: int, *, plan: str, signal_name: str, sabotage: str | None):
        self.rng = random.Random(seed)
        self.plan, self.sabotage = plan, sabotage
        self.number = signal.Signals[f"SIG{signal_name}"]
        self.tried = collections.Counter()
        self.kills: list[Kill] = []
        self.num_starts = 0
        self.whole_s = 0.0
        (HOME / "texts").mkdir()
        for number in range(40):
            words = [f"{'abcdefgh'[(number + k * k) % 8]}{k % 7}" for k in range(3000)]
            (HOME / "texts" / f"{number}.txt").write_text(" ".join(words))
        (HOME / "config.py").write_text(CONFIG)

    def start(self, run_dir: Path) -> Watched:
        self.num_starts += 1
        args = ["--config", str(HOME / "config.py"), "--run_dir", str(run_dir)]
        own = {"JAXLM_CACHE": f"{run_dir}.cache", "JAXLM_RECORD_BATCHES": f"{run_dir}.batches"}
        log = Path(f"{run_dir}.log")
        sabotage = SABOTAGES.get(self.sabotage) if list_steps(run_dir / "checkpoints") else None

        def forked() -> int:
            os.environ.update(own)
            if sabotage:
                sabotage()
            return launch.run_main(lambda: launch.main(args))

        def plain() -> subprocess.Popen:
            command = [sys.executable, str(text_run.REPO / "launch.py"), *args]
            with log.open("ab") as out:
                return subprocess.Popen(command, env=os.environ | own, stdout=out, stderr=out)

        if self.num_starts % 10 == 0 and not self.sabotage:
            return Watched(run_dir, plain)
        return Watched(run_dir, lambda: Forked(forked, log))

    def finish(self, run_dir: Path) -> float:
        with self.start(run_dir) as attempt:
            if code := attempt.process.wait():
                raise AssertionError(f"exit code {code}\n{log_of(run_dir)}")
            return attempt.age_s()

    def break_run(self, run_dir: Path, num_kills: int) -> None:
        """Kills one run at most so many times, then lets it end."""
        end = len(self.kills) + num_kills
        while len(self.kills) < end:
            aim = self._choose(run_dir)
            if aim == "setting aside":
                text_run.damage(
                    run_dir / "checkpoints" / str(list_steps(run_dir / "checkpoints")[-1])
                )
            owing = aim == "replacing" and not owes_eval(run_dir)
            self.tried[aim] += 1
            with self.start(run_dir) as attempt:
                if not attempt.wait_for(self._to_owe_an_eval() if owing else self._there(aim)):
                    if code := attempt.process.wait():
                        raise AssertionError(f"exit code {code}\n{log_of(run_dir)}")
                    return
                if owing:
                    attempt.kill(signal.SIGTERM)
                    continue
                time.sleep(self.rng.uniform(0, DELAY_S.get(aim, 0)))
                self._kill(attempt)
        self.finish(run_dir)

    def missed(self) -> list[str]:
        """Phases that no kill has hit."""
        hit = {kill.phase for kill in self.kills}
        return [phase for phase in PHASES if phase not in hit]

    def table(self) -> str:
        """Kills by phase."""
        hits = collections.Counter(kill.phase for kill in self.kills)
        lines = ["| phase | aimed at | hit |", "|---|---:|---:|"]
        phases = [*PHASES, *sorted(hits.keys() - set(PHASES))]
        return "\n".join(lines + [f"| {p} | {self.tried[p]} | {hits[p]} |" for p in phases])

    def _kill(self, attempt: Watched) -> None:
        if self.number == signal.SIGKILL:
            self.kills.append(attempt.kill(signal.SIGKILL))
            return
        # A run that stops as it should leaves no trace of where it was.
        phase, step = attempt.phase(), attempt.last_step()
        log = Path(f"{attempt.run_dir}.log")
        num_taken = log.read_text().count(TAKEN) if log.exists() else 0
        twice = self.rng.random() < 0.5
        numbers = [self.number] * (2 if twice else 1)
        kill = attempt.kill(*numbers, gap_s=self.rng.uniform(0, 0.03) if twice else 0)
        self.kills.append(kill._replace(phase=phase, step=step))
        allowed = {0, launch.STOPPED}  # 0: it was at the end of its plan
        # Before the loop there is nothing to save, and Ctrl-C acts at once.
        at_once = twice or log.read_text().count(TAKEN) == num_taken
        if self.number == signal.SIGINT and at_once:
            allowed |= {130, -signal.SIGINT}
        if self.number == signal.SIGTERM and (twice or phase == "starting"):
            allowed |= {-signal.SIGTERM}
        if kill.code not in allowed:
            raise AssertionError(f"{self.kills[-1]}: expected {allowed}\n{log_of(attempt.run_dir)}")

    def _choose(self, run_dir: Path) -> str:
        """The phase that can be had now and was tried least."""
        if self.plan == "random":
            return "random"
        if self.sabotage:
            return "eval"  # there is a checkpoint then, and there are rows after it
        possible = set(PHASES)
        steps = list_steps(run_dir / "checkpoints")
        sound = [s for s in steps if not find_damage(run_dir / "checkpoints" / str(s))]
        if list(cache_of(run_dir).glob(f"data/*/{MANIFEST}")):
            possible.remove("preparing")
        possible -= {"compile"} if steps else {"restore", "setting aside"}
        # A second damaged one would not be set aside at once.
        possible -= {"setting aside"} if len(sound) < 2 or sound != steps else set()
        if owes_eval(run_dir):
            possible = {"replacing"}
        least = min(self.tried[phase] for phase in possible)
        for first in ("preparing", "compile"):  # out of reach after this start
            if first in possible and self.tried[first] == least:
                return first
        return self.rng.choice(sorted(p for p in possible if self.tried[p] == least))

    def _there(self, aim: str) -> Callable[[Watched], bool]:
        if aim == "random":
            instant_s = self.rng.uniform(0, self.whole_s)
            return lambda attempt: attempt.age_s() >= instant_s
        # Steps without a save under way are seldom seen: the first one is taken.
        further = self.rng.randint(0, 8) if aim in PHASES[5:-1] else 0
        begun: list[int] = []

        def there(attempt: Watched) -> bool:
            phase = attempt.phase()
            if phase in (aim, "step"):
                begun.append(attempt.last_step())
            # What is over in a moment may go unseen: strike elsewhere rather than let it end.
            missed = phase == "step" and begun[-1] > begun[0] + further + EVAL_INTERVAL
            return missed or (phase == aim and begun[-1] >= begun[0] + further)

        return there

    def _to_owe_an_eval(self) -> Callable[[Watched], bool]:
        # The row of a step is logged once the next one is under way, just before signals are
        # looked for: after this one, there is time for one to arrive.
        begun: list[int] = []

        def there(attempt: Watched) -> bool:
            if attempt.phase() not in PHASES[4:]:
                return False
            begun.append(attempt.last_step())
            return eval_due(begun[-1] + 2) or begun[-1] > begun[0] + 2 * EVAL_INTERVAL

        return there


def owes_eval(run_dir: Path) -> bool:
    found = scan_folder(run_dir / "checkpoints").sound
    return bool(found) and eval_due(max(found)) and found[max(found)].eval_loss is None


def log_of(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text(errors="replace")[-4000:]


def compared(whole: Path, broken: Path) -> list[str]:
    """`compare_runs` in a process of its own: it starts a backend, after which none may fork."""
    found = Path(f"{broken}.differences")

    def compare() -> int:
        found.write_text(json.dumps(compare_runs(whole, broken)))
        return 0

    log = Path(f"{broken}.log")
    assert Forked(compare, log).wait() == 0, log_of(broken)
    return json.loads(found.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", choices=("aimed", "random"), default="aimed")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--sabotage", choices=SABOTAGES)
    parser.add_argument("--out", type=Path, help="all kills, as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell sent us off
    print(f"seed {args.seed}, in {HOME}", flush=True)
    chaos = Chaos(args.seed, plan=args.plan, signal_name=args.signal, sabotage=args.sabotage)
    whole, again = HOME / "whole", HOME / "again"
    chaos.finish(whole)
    chaos.whole_s = chaos.finish(again)
    differences = compared(whole, again)
    for number in itertools.count():
        enough = len(chaos.kills) >= args.kills
        if enough and (
            args.plan == "random" or not chaos.missed() or args.kills < len(PHASES) ** 2
        ):
            break
        run_dir = HOME / f"broken-{number}"
        missing = args.kills - len(chaos.kills)
        chaos.break_run(run_dir, min(missing, MOST_KILLS) if missing > 0 else len(PHASES))
        found = compared(whole, run_dir)
        differences += found
        print(f"run {number}: {len(chaos.kills)} kills, {len(found)} differences", flush=True)
        for text in found[:10]:
            print(f"  {text}")
        shutil.rmtree(run_dir)
    print(chaos.table())
    print(f"{len(chaos.kills)} kills in {chaos.num_starts} starts; {len(differences)} differences")
    if args.out:
        args.out.write_text(json.dumps([kill._asdict() for kill in chaos.kills], indent=1))
    shutil.rmtree(HOME)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
