"""What a resume may change, and what the bits of a run depend on besides its config."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import Change, Config, changes
from jaxlm.folder import Best, Metadata, find_best, list_steps, read_all_metadata
from jaxlm.optim import make_schedule

_VERSIONS = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Plan(NamedTuple):
    """How a run goes on."""

    config: Config
    """The config to train with."""
    latest: Metadata | None
    """The newest checkpoint, or None for a new run."""
    changed: list[Change]
    """Fields that differ from it; none of them fixed."""
    best: Best | None
    """The best checkpoint on disk."""

    @property
    def recorded(self) -> list[Change]:
        """Those changes that the lineage keeps."""
        return [change for change in self.changed if change.policy == "recorded"]

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to train."""
        if self.latest is None:
            return False
        limit = self.config.stop_after_worse_evals
        overfit = limit is not None and self.latest.num_worse_evals >= limit
        return self.latest.step >= self.config.num_steps or overfit


def plan_resume(config: Config, say: Callable[[str], None]) -> Plan:
    """Holds the config against what its checkpoint folder was trained with.

    Raises:
      ValueError: a fixed field differs, or `resume` is `never` and the folder holds checkpoints.
    """
    folder = Path(config.checkpoint_dir)
    if config.resume == "never" and list_steps(folder):
        raise ValueError(
            f"resume: found never, but {folder} holds checkpoints {list_steps(folder)}; "
            "choose another --run_dir, or leave --resume out to go on from the latest"
        )
    found = read_all_metadata(folder)
    if not found:
        return Plan(config, None, [], None)
    latest = found[max(found)]
    before = latest.run_config()
    if config.data.max_tokens is None:
        # Resolved at the run's start: a longer run goes through the same tokens more often.
        data = dataclasses.replace(config.data, max_tokens=before.data.max_tokens)
        config = dataclasses.replace(config, data=data)
    differing = changes(before, config)
    refused = [str(change) for change in differing if change.policy == "fixed"]
    if refused:
        raise ValueError(
            f"{folder} holds a run with other settings, which cannot change on the way:\n  "
            + "\n  ".join(refused)
            + "\nadd --run_dir for a new run, or set these back to go on with this one"
        )
    best = find_best({step: metadata.eval_loss for step, metadata in found.items()})
    plan = Plan(config, latest, differing, best)
    if plan.complete:
        return plan
    for change in plan.recorded:
        say(f"changed from step {latest.step} on: {change}")
    if any(change.name.startswith(("optim.", "num_steps")) for change in plan.recorded):
        was, now = (_learning_rate(c, latest.step) for c in (before, config))
        say(f"learning rate at step {latest.step}: was {was:.3e}, is {now:.3e}")
    return plan


def _learning_rate(config: Config, step: int) -> float:
    return float(np.asarray(make_schedule(config.optim, config.num_steps)(step)))


def describe_environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, devices and cores, as JSON values."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "device_kind": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def compare_environments(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> list[str]:
    """What differs, one `name: was …, is …` each."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += compare_environments(was, is_now, f"{prefix}{name}.")
        elif was != is_now:
            found.append(f"{prefix}{name}: was {was}, is {is_now}")
    return found
