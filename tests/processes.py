"""The real launch command on a small run of text, as processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.folder import list_steps

ROOT = Path(__file__).parent.parent
PATIENCE_S = 900
"""Only what hangs takes longer, on a machine that is busy with other work too."""
_CONFIG = """
import os
from jaxlm.config import *
from jaxlm.data.batches import TrainBatches

make, at = TrainBatches.__call__, os.environ.get("SIGNAL_AT_BATCH", "").split()

def make_or_end(self, index, *rows):
    if at and index == int(at[0]):
        os.kill(os.getpid(), int(at[1]))
    return make(self, index, *rows)

TrainBatches.__call__ = make_or_end
config = Config(
    model=ModelConfig(vocab_size=300, num_layers=2, d_model=32, d_ff=64, num_heads=2,
                      num_kv_heads=2, head_dim=16),
    data=DataConfig(source="text:{texts}/*.txt"),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=3),
    checkpoint=CheckpointConfig(save_interval=10),
    num_steps=300, batch_size=4, seq_len=32, eval_interval=25, log_interval=5,
)
"""


def write_config(folder: Path) -> Path:
    """A config file, and the text that it trains on."""
    for number in range(40):
        words = [f"{'abcdefgh'[(number + k * k) % 8]}{k % 7}" for k in range(300)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    path = folder / "launched.py"
    path.write_text(_CONFIG.format(texts=folder))
    return path


def launch(
    config_file: Path,
    run_dir: Path,
    *flags: str,
    at: tuple[int, int] | None = None,
    stdout: Any = subprocess.PIPE,
    **env: str,
) -> subprocess.Popen:
    """Starts `python launch.py`; errors go where the output goes.

    Args:
      config_file: as `write_config` makes it.
      run_dir: the run folder.
      flags: of the command.
      at: the process sends itself this signal when it makes this batch: (batch, signal). Sent from
        here, a signal may come when the run has ended.
      stdout: where the output goes.
      env: environment variables.
    """
    # One device, and whatever else conftest has set for this process left out.
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    if at:
        clean["SIGNAL_AT_BATCH"] = f"{at[0]} {int(at[1])}"
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(config_file)]
    return subprocess.Popen(
        [*command, "--run_dir", str(run_dir), *flags],
        env={**clean, **env},
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of that step or a later one is on disk."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if any(found >= step for found in list_steps(run_dir / "checkpoints")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {PATIENCE_S} s")


def finish(process: subprocess.Popen, code: int, timeout_s: float = PATIENCE_S) -> str:
    """The output of a process that is to end with this exit code."""
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == code, output
    return output
