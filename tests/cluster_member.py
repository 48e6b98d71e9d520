"""One of several processes of tests/test_cluster.py: `cluster_member.py WHAT WHO [FOLDER]`.

WHO is the process that something happens to; each prints `ready` before that.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tiny_run import TinyBatches, TinyEvalSet, data, tiny_config

from jaxlm import cluster
from jaxlm.checkpoints import folder, manifest, multihost
from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.cluster import Cluster, agree, barrier, check_equal
from jaxlm.config import DataConfig, MeshConfig, OptimConfig
from jaxlm.device.state import TrainState
from jaxlm.launch import explain, run_main
from jaxlm.training import start
from jaxlm.training.train import train


def ready() -> None:
    """Lets the test go on, once all processes are there."""
    barrier(key="ready", timeout_ms=120_000)
    print("ready", flush=True)
    time.sleep(0.5)


def collectives(mine: bool) -> None:
    """One after the other, as in training, for two minutes."""
    for number in range(12_000):
        multihost_utils.process_allgather(np.ones(3))
        if number == 3:
            ready()
        time.sleep(0.01)


def wait(mine: bool) -> None:
    """In no collective: data is prepared, a program compiled, a disk is slow."""
    ready()
    time.sleep(120)


def differ(mine: bool) -> None:
    """One has another seed."""
    ready()
    check_equal("settings", {"seed": int(mine), "steps": [1, 2]})
    time.sleep(120)


def fail(mine: bool) -> None:
    """One has a bug; the others are where it cannot be seen."""
    ready()
    if mine:
        raise KeyError("a bug")
    time.sleep(120)


def end(mine: bool) -> None:
    """All is well, and one is late."""
    check_equal("settings", {"seed": 0})
    check_equal("data", {"fingerprint": "a"})
    ready()
    time.sleep(2 * mine)


def late(mine: bool) -> None:
    """A stop owes an eval, and one comes late to where its step is saved again."""

    class Stopping(TinyBatches):
        def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
            if index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(index, rows)

    def replace(self: Checkpoints, *args: Any) -> None:
        time.sleep(mine)
        saves_again(self, *args)

    saves_again, Checkpoints.replace = Checkpoints.replace, replace
    config = tiny_config(sys.argv[3], eval_interval=1)
    assert not train(config, batches=Stopping(), eval_batches=TinyEvalSet()).complete
    ready()
    assert train(config, **data()).complete


class LongEvalSet(TinyEvalSet):
    """Eight batches; something happens in one of those of the second eval, the first time."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.act, self.count = act, 0

    def __len__(self) -> int:
        return 8

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        self.count += index == 2
        if self.count == 2 and index == 2:
            self.act()
        return super().__call__(index, rows)


def stops_in_an_eval(mine: bool) -> None:
    """One gets a signal in an eval; both leave it, and make it at the next start."""

    def stop() -> None:
        if mine:
            signal.raise_signal(signal.SIGTERM)

    config, whole = tiny_config(sys.argv[3]), tiny_config(f"{sys.argv[3]}-whole")
    ready()
    result = train(config, batches=TinyBatches(), eval_batches=LongEvalSet(stop))
    assert (result.step, result.complete) == (6, False), result
    assert folder.read_metadata(Path(config.checkpoint_dir), 6).eval_loss is None
    for each in (config, whole):
        assert train(each, batches=TinyBatches(), eval_batches=LongEvalSet()).complete


def fails_in_an_eval(mine: bool) -> None:
    """An eval raises on both; the step is saved before they end."""

    def fail() -> None:
        raise OSError("the held-out set is gone")

    config, whole = tiny_config(sys.argv[3]), tiny_config(f"{sys.argv[3]}-whole")
    ready()
    try:
        train(config, batches=TinyBatches(), eval_batches=LongEvalSet(fail))
    except OSError:
        assert folder.read_metadata(Path(config.checkpoint_dir), 6).eval_loss is None
    else:
        raise AssertionError("the eval did not fail")
    for each in (config, whole):
        assert train(each, batches=TinyBatches(), eval_batches=LongEvalSet()).complete


def blind(mine: bool) -> None:
    """One never sees the steps on a shared disk, and the run has to go back."""

    def is_hidden(path: Path) -> bool:
        return mine and path.parent.name == "checkpoints" and path.name.isdigit()

    def iterdir(self: Path) -> Iterator[Path]:
        if is_hidden(self):
            raise FileNotFoundError(self)
        return iter([path for path in lists(self) if not is_hidden(path)])

    exists, is_dir, lists = Path.exists, Path.is_dir, Path.iterdir
    Path.exists = lambda self: not is_hidden(self) and exists(self)
    Path.is_dir = lambda self: not is_hidden(self) and is_dir(self)
    Path.iterdir = iterdir
    ready()
    train(tiny_config(sys.argv[3]), **data())
    ruinous = OptimConfig(learning_rate=3.0, warmup_steps=2)
    train(tiny_config(sys.argv[3], num_steps=16, optim=ruinous), **data())
    result = train(tiny_config(sys.argv[3], num_steps=20, resume="best"), **data())
    print(f"{result.step} steps, {result.best}")


def follows(mine: bool) -> None:
    """A run is looked at by process 0 alone, and the others are told."""
    train(tiny_config(sys.argv[3]), **data())
    ready()
    if mine:
        multihost.scan_folder = lambda *_, **__: sys.exit("it has looked by itself")
    assert train(tiny_config(sys.argv[3], num_steps=16), **data()).complete


def begins(mine: bool) -> None:
    """A run begins with the best of another, and one does not see its best yet."""
    train(tiny_config(f"{sys.argv[3]}-1"), **data())
    ready()
    lists = folder.list_steps
    folder.list_steps = lambda path: [s for s in lists(path) if not (mine and s == 12)]
    config = tiny_config(sys.argv[3], num_steps=4, init_from=f"{sys.argv[3]}-1@best")
    chosen, begin = [], start.restore_weights
    start.restore_weights = lambda path, *args: chosen.append(path.name) or begin(path, *args)
    train(config, **data())
    print("began with", *chosen)


def waits(mine: bool) -> None:
    """One comes late to where all agree."""
    ready()
    time.sleep(60 * mine)
    agree(None)


def share(mine: bool) -> None:
    """A file is damaged, and each looks at some of them."""
    config = tiny_config(sys.argv[3])
    train(config, **data())
    ready()
    where, read = Path(config.checkpoint_dir), []
    with Checkpoints(where, config.checkpoint, on_commit=print) as checkpoints:
        files = [path for path in (where / "12").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: (path.stat().st_size, path))
        checksum = manifest.crc32c
        manifest.crc32c = lambda path: read.append(path) or checksum(path)
        assert checkpoints.damage(12) == []
        manifest.crc32c = checksum
        if mine:
            flipped = bytearray(largest.read_bytes())
            flipped[0] ^= 1
            largest.write_bytes(flipped)
        barrier(key="damaged", timeout_ms=60_000)
        damage = checkpoints.damage(12)
    print(json.dumps({"damage": damage, "largest": largest.name, "read": list(map(str, read))}))


def apart(mine: bool) -> None:
    """Each has a disk of its own."""
    cluster._VISIBLE_TIMEOUT_S = 1
    ready()
    train(tiny_config(f"{sys.argv[3]}-{jax.process_index()}"), **data())


def save(mine: bool) -> None:
    """The disk of one is full once step 4 is saved."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    train_until(lambda: mine and resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard)))


def hang(mine: bool) -> None:
    """The disk of one does not answer once step 4 is saved."""

    def break_disk() -> None:
        if mine:
            manifest.write_manifest = lambda path: time.sleep(600)

    train_until(break_disk)


def spoil(mine: bool) -> None:
    """The params of step 8 are not finite, and all are busy elsewhere while it would be saved."""
    to_nan = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * jnp.nan, tree))

    def save(self: Checkpoints, state: TrainState, metadata: Metadata, *args: Any) -> None:
        if metadata.step == 8:
            state = state._replace(params=to_nan(state.params))
        saves(self, state, metadata, *args)
        time.sleep(2 * (metadata.step == 8))

    saves, Checkpoints.save = Checkpoints.save, save
    train_until(lambda: None)


def train_until(break_disk: Callable[[], object]) -> None:
    """Trains, and breaks the disk between two saves."""

    class Batches(TinyBatches):
        def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
            if index == 7:
                while not (run / "checkpoints" / "4").exists():
                    time.sleep(0.01)
                ready()
                break_disk()
            return super().__call__(index, rows)

    run = Path(sys.argv[3])
    config = tiny_config(
        run,
        eval_interval=100,
        checkpoint={"save_timeout_s": 4},
        data=DataConfig(prefetch=1),
        mesh=MeshConfig(fsdp=jax.process_count()),  # each saves a part that no other has
    )
    train(config, batches=Batches())


def main() -> int:
    what, who = globals()[sys.argv[1]], int(sys.argv[2])
    with Cluster(explain):
        what(jax.process_index() == who)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
