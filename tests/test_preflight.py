"""What is said before the first step, and when memory runs out."""

import collections
import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import text_run
from tiny_model import MODEL, blueprint_of, names_and_leaves

from jaxlm.config import CheckpointConfig, Config
from jaxlm.device.guard import WINDOW
from jaxlm.device.state import num_bytes
from jaxlm.training import preflight

ABSTRACT = blueprint_of().abstract
NUM_PARAMS = sum(leaf.size for leaf in jax.tree.leaves(ABSTRACT.params))
# The hidden matrices have one moment, all else two; int32 counts of steps (the state's, Muon's,
# Adam's and two of the guard), Muon's coefficients, and the losses and norms of the guard.
NUM_HIDDEN = sum(
    param.size
    for name, param in names_and_leaves(ABSTRACT.params).items()
    if re.search(r"/w_\w*D\w*$", name)
)
STATE_BYTES = 4 * (3 * NUM_PARAMS - NUM_HIDDEN + 5 + 5 * 3 + 2 * WINDOW)


def config_in(folder: Path, num_steps: int = 1000, **checkpoint: Any) -> Config:
    checkpoint_config = CheckpointConfig(**checkpoint)
    return Config(
        model=MODEL, checkpoint=checkpoint_config, num_steps=num_steps, run_dir=str(folder)
    )


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**15, 0, free))


def test_bytes_are_counted_once_however_many_devices_hold_them():
    assert num_bytes(ABSTRACT) == STATE_BYTES
    assert num_bytes(blueprint_of((4, 2, 1)).abstract) == STATE_BYTES


@pytest.mark.parametrize("keep_latest", [1, 3])
def test_the_disk_plan_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_latest: int):
    config = config_in(tmp_path / "run", keep_latest=keep_latest)
    needed = STATE_BYTES * (keep_latest + 3)  # best, the one being written, the one being deleted
    assert preflight.checkpoint_bytes(config, ABSTRACT) == needed
    set_free(monkeypatch, needed)
    assert preflight.disk_shortage(config, ABSTRACT) is None
    set_free(monkeypatch, needed - 1)
    warning = preflight.disk_shortage(config, ABSTRACT)
    # Only what is set, and can be lower, is named.
    assert warning and ("lower --checkpoint.keep_latest" in warning) == (keep_latest > 1)
    assert "keep_every" not in warning and "disk_budget" not in warning
    assert f"in {tmp_path}/run/checkpoints" in warning
    assert not (tmp_path / "run").exists()  # only looked at


def test_what_is_kept_for_good_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_in(tmp_path, num_steps=1000, keep_every=100)
    needed = STATE_BYTES * (6 + 10)
    set_free(monkeypatch, needed)
    assert preflight.disk_shortage(config, ABSTRACT) is None
    set_free(monkeypatch, needed - 1)
    assert preflight.disk_shortage(config, ABSTRACT)


def test_what_the_run_holds_already_is_not_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_in(tmp_path)
    set_free(monkeypatch, STATE_BYTES * 6 - 100)
    assert preflight.disk_shortage(config, ABSTRACT)
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    (tmp_path / "checkpoints/4/array").write_bytes(b"x" * 100)
    assert preflight.disk_shortage(config, ABSTRACT) is None


def test_the_plan_holds_for_a_real_run(shared_home: Path):
    checkpoints = shared_home / text_run.RUN / "checkpoints"
    sizes = [
        sum(path.stat().st_size for path in (checkpoints / step).rglob("*") if path.is_file())
        for step in ("4", "8", "12")
    ]
    # Of so small a state, what lies beside the arrays shows.
    state_bytes = 542_600
    assert all(state_bytes <= size < state_bytes + 2_000_000 for size in sizes), sizes


def test_describe():
    config = Config(model=MODEL, batch_size=16, seq_len=256, num_steps=1000)
    text = preflight.describe(config, ABSTRACT, None, 1)
    assert text == f"{NUM_PARAMS / 1e3:.1f} k parameters; 4.1 k tokens a step, 4.1 M in all"
    memory = SimpleNamespace(argument_size_in_bytes=2_100_000_000, temp_size_in_bytes=350_000)
    lines = preflight.describe(config, ABSTRACT, memory, 8).splitlines()
    assert lines[0] == text
    assert lines[1] == (
        "memory on each of 8 device(s): 2.1 GB state and batch, 350.0 kB temporaries"
    )


def test_a_run_says_it_all_before_its_first_step(own_home: Path, monkeypatch: pytest.MonkeyPatch):
    set_free(monkeypatch, 1000)
    _, said = text_run.launched(
        own_home, "--num_steps 3 --run_dir runs/b --save_interval 2 --eval_interval 3"
    )
    before = said[: said.index("Step     1/3")]
    assert "51.4 k parameters; 256 tokens a step, 768 in all" in before
    assert re.search(r"memory on each of 8 device\(s\): .* temporaries", before)
    assert "checkpoints: 543.7 kB each, at most 3.3 MB on disk, every 2 steps" in before
    warnings = re.findall("Warning: (.*)", before)
    assert len(warnings) == 2
    assert warnings[0].startswith("checkpoints need up to 3.3 MB in runs/b/checkpoints, and the ")
    assert "disk has 1.0 kB" in warnings[0]
    assert warnings[1].startswith("save_interval 2 and eval_interval 3 seldom meet")


def test_a_low_disk_and_a_small_budget_are_refused_before_the_first_step(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
):
    set_free(monkeypatch, 1000)
    flags = "--run_dir runs/b --checkpoint.on_low_disk refuse"
    with pytest.raises(ValueError, match=r"need up to 3.3 MB in runs/b.*the disk has 1.0 kB"):
        text_run.launched(own_home, flags)
    set_free(monkeypatch, 10**9)
    with pytest.raises(ValueError, match=r"found 0.001, expected at least 0.00326: 4 checkpoints"):
        text_run.launched(own_home, f"{flags} --checkpoint.disk_budget_gb 0.001")
    assert not (own_home / "runs/b").exists()


@pytest.mark.parametrize("sign", ["RESOURCE_EXHAUSTED: x", "Out of memory allocating 9 bytes"])
def test_device_advice(sign: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    config = Config(batch_size=12)
    advice = preflight.device_advice(RuntimeError(sign), config)
    assert advice
    tries = [line.split()[0] for line in advice.splitlines()[1:]]
    assert tries[:3] == ["--num_microbatches", "--loss_chunks", "--model.remat"]
    assert tries[3:] == ["--mesh.fsdp", "--batch_size"]
    assert "--num_microbatches 2" in advice and "--batch_size 6" in advice


def test_a_gpu_may_do_without_deterministic_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    error = RuntimeError("INTERNAL: no kernel")
    assert "--no-deterministic" in str(preflight.device_advice(error, Config()))
    assert preflight.device_advice(error, Config(deterministic=False)) is None


def test_device_advice_does_not_give_what_cannot_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = Config(batch_size=6, num_microbatches=3)  # six rows make no twelve parts
    assert "--num_microbatches 6" in str(
        preflight.device_advice(MemoryError("out of memory"), config)
    )
    config = dataclasses.replace(config, num_microbatches=6, loss_chunks=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    advice = str(preflight.device_advice(MemoryError("out of memory"), config))
    assert not any(name in advice for name in ("microbatches", "loss_chunks", "remat"))
    monkeypatch.setattr(jax, "device_count", lambda: 12)  # of twelve rows, each has one
    advice = str(preflight.device_advice(MemoryError("out of memory"), Config(batch_size=12)))
    assert "--mesh.fsdp" in advice and "--num_micro" not in advice and "--batch_s" not in advice
    assert preflight.device_advice(ValueError("shape mismatch"), config) is None
