"""`jaxlm prove-resume`: proves that a killed and resumed run equals an uninterrupted one.

The proof uses the user's config and machine; some settings are changed to keep it short.
"""

import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.folder import scan_folder
from jaxlm.config import Config, to_dict
from jaxlm.data.run_data import default_eval_tokens, default_max_tokens
from jaxlm.errors import InputError
from jaxlm.files.durable import check_output_path
from jaxlm.launch import STOPPED
from jaxlm.proof.attempt import Attempt, Kill, compare_runs, facts_of

COMMAND = (sys.executable, "-c")
COMMAND += ("from jaxlm.launch import leave, main, run_main; leave(run_main(main))",)
"""Runs launch.py's main, from any current directory."""
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Settings:
    """The flags of `jaxlm prove-resume`, in addition to those of launch.py."""

    prove_steps: int = 12
    """Steps of the run (steps)."""
    prove_kills: int = 3
    """Kills at random times, in addition to one in a save and a SIGTERM."""
    prove_seed: int = 0
    """Seed of the random times."""
    out: Path | None = None
    """Write the certificate here as JSON."""

    def __post_init__(self) -> None:
        for name, least in (("prove_steps", 4), ("prove_kills", 0)):
            if (found := getattr(self, name)) < least:
                raise InputError(f"{name}: found {found}, expected at least {least}")
        if self.out:
            object.__setattr__(self, "out", check_output_path(self.out))


def prove(config: Config, flags: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Trains an uninterrupted run, then one with kills, and compares them.

    Args:
      config: the config of `flags`.
      flags: flags of launch.py.
      settings: numbers of steps and kills.

    Returns:
      The certificate, as JSON values; `wrong` lists the differences.

    Raises:
      ValueError: the uninterrupted run fails, or the run has several processes.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise InputError("found JAX_COORDINATOR_ADDRESS, expected a single process; unset it first")
    overrides = _proof_flags(config, settings.prove_steps)
    print(f"for the proof: {' '.join(overrides)}")
    parent = Path(config.run_dir).parent  # the disk of the real run's checkpoints
    with tempfile.TemporaryDirectory(
        prefix="prove-resume-", dir=parent if parent.is_dir() else "."
    ) as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        with _start([*flags, *overrides], whole) as attempt:
            if code := attempt.process.wait():
                raise InputError(
                    f"the uninterrupted run ended with exit code {code}: {_last_log_line(whole)}; "
                    f"try `launch.py {' '.join(flags)}` first"
                )
            whole_s = attempt.age_s()
        print(f"uninterrupted: {whole_s:.1f} s")
        kills, wrong = _kill_and_resume([*flags, *overrides], killed, whole_s, settings)
        wrong = wrong or compare_runs(whole, killed)
        metadata = scan_folder(whole / "checkpoints").sound[settings.prove_steps]
        steps = [_by_step(run, settings.prove_steps) for run in (whole, killed)]
    return {
        "proven": not wrong,
        "wrong": wrong,
        "kills": [kill._asdict() for kill in kills],
        "seed": settings.prove_seed,
        "flags": [*flags, *overrides],
        "config_sha256": _sha256(to_dict(config)),
        "data": metadata.data,
        "environment": metadata.environment,
        "fingerprints": metadata.fingerprints,
        "steps": steps[0],
        "steps_resumed": steps[1],
    }


def _by_step(run_dir: Path, num_steps: int) -> list[dict[str, list[str]]]:
    facts = sorted(facts_of(run_dir).items())
    steps = range(1, num_steps + 1)
    return [{name: found for (at, name), found in facts if at == step} for step in steps]


def _proof_flags(config: Config, steps: int) -> list[str]:
    num_tokens = config.num_steps * config.tokens_per_step
    values = {
        "num_steps": steps,
        "optim.warmup_steps": min(config.optim.warmup_steps, steps // 2),
        "data.eval_tokens": default_eval_tokens(config),
        "data.max_tokens": default_max_tokens(config.data, num_tokens),  # as in the real run
        "save_interval": steps // 4,
        "eval_interval": steps // 3,
        "tasks.interval": steps // 3,
        "log_interval": 1,
        "stop_after_worse_evals": None,
        "branch_from": None,
        "init_from": None,
        "resume": "auto",
        "checkpoint.save_interval_min": None,
        "checkpoint.keep_latest": 2,
        "checkpoint.keep_every": None,
        "checkpoint.disk_budget_gb": None,
        "tracking.wandb": "off",
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*flags, "--tracking.no-tensorboard"]


def _start(flags: Sequence[str], run_dir: Path) -> Attempt:
    command = [*COMMAND, *flags, f"--run_dir={run_dir}", f"--checkpoint_dir={run_dir}/checkpoints"]
    environment = {**os.environ, "JAXLM_RECORD_BATCHES": f"{run_dir}.batches"}
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        # The cache would hide a compiler whose output varies between starts.
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with open(f"{run_dir}.log", "ab") as log:
        return Attempt(
            run_dir, lambda: subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        )


def _kill_and_resume(
    flags: Sequence[str], run_dir: Path, whole_s: float, settings: Settings
) -> tuple[list[Kill], list[str]]:
    """Kills a run repeatedly, then lets it complete; returns kills and errors."""
    rng = random.Random(settings.prove_seed)
    stop_step = rng.randint(1, settings.prove_steps // 2)

    def in_save(attempt: Attempt) -> bool:
        return attempt.phase() == "saving"

    def in_step(attempt: Attempt) -> bool:
        return attempt.phase() == "training" and attempt.last_step() >= stop_step

    def at(time_s: float, step: float) -> Callable[[Attempt], bool]:
        return lambda attempt: attempt.age_s() >= time_s or attempt.last_step() >= step

    # The first kill comes early, so that steps remain for the others.
    latest = [(0.6 * whole_s, settings.prove_steps // 2)]
    latest += [(whole_s, math.inf)] * settings.prove_kills
    aims = [(at(rng.uniform(0, x), n), signal.SIGKILL) for x, n in latest[: settings.prove_kills]]
    aims[1:1] = [(in_save, signal.SIGKILL), (in_step, signal.SIGTERM)]
    kills: list[Kill] = []
    while aims:
        condition, number = aims[0]
        with _start(flags, run_dir) as attempt:
            if not attempt.wait_for(condition):
                break  # the run ended before the kill
            kills.append(attempt.kill(number))
        print("{} after {} s, {}, step {}: exit code {}".format(*kills[-1]))
        # Retry a kill aimed at a save that had ended.
        if condition is not in_save or kills[-1].phase == "saving":
            del aims[0]
    with _start(flags, run_dir) as attempt:
        code = attempt.process.wait()
    if code:
        return kills, [f"the resumed run ended with exit code {code}: {_last_log_line(run_dir)}"]
    if not any(kill.phase == "saving" for kill in kills):
        return kills, ["no kill fell into a save; try more --prove_steps"]
    if not any(kill.code == STOPPED for kill in kills):
        return kills, ["no SIGTERM fell into a step; try more --prove_steps"]
    return kills, []


def _last_log_line(run_dir: Path) -> str:
    lines = Path(f"{run_dir}.log").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if re.search(r"\w", line)), "no output")


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe(certificate: dict[str, Any]) -> list[str]:
    """The certificate, as lines of text."""
    steps = certificate["steps"]
    lines = [
        f"config {certificate['config_sha256']}, data {certificate['data']}",
        *(f"{name}: {value}" for name, value in certificate["environment"].items()),
        f"seed {certificate['seed']}, {len(certificate['kills'])} kills",
    ]
    for number, facts in enumerate(steps, 1):
        shown = (f"{name} {' '.join(found)}" for name, found in facts.items() if _is_shown(name))
        lines.append(f"step {number}: {', '.join(shown)}")
    found = certificate["fingerprints"]
    for item in ("params", "ema_params", "opt_state"):
        if arrays := {k: v for k, v in found.items() if k.startswith(f"{item}/")}:
            lines.append(f"{item}: {len(arrays)} arrays, fingerprint {_sha256(arrays)}")
    lines += [f"WRONG: {text}" for text in certificate["wrong"][:_MAX_SHOWN]]
    if certificate["wrong"]:
        return [*lines, *_hints(certificate), "NOT PROVEN: the resumed run differs"]
    return [*lines, "PROVEN: every array, loss, eval loss and batch is equal to the bit"]


def _is_shown(name: str) -> bool:
    return name.startswith("batch") or name in ("train/loss", "eval/loss")


def _hints(certificate: dict[str, Any]) -> list[str]:
    if any(": batch, rows" in text for text in certificate["wrong"]):
        return [
            "hint: batch n may depend on n and the seed alone, never on the clock or os.urandom"
        ]
    if certificate["environment"]["device_kind"] != "cpu":
        return ["hint: on a GPU, --no-deterministic and XLA_FLAGS of your own change bits"]
    return ["hint: a model or a loss that draws from the clock or os.urandom cannot be resumed"]
