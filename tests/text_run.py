"""A real run of a second on text files, made once a session (fixture `shared_home`), and its like.

Eight steps that learn, then four at a learning rate that ruins it: best and latest differ, two
plans have ended, and something was changed on the way.
"""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tiny_model import transformer

from jaxlm import launch
from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, to_dict
from jaxlm.corpus.tokenizer import train_tokenizer
from jaxlm.device.optim import make_optimizer
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import make_blueprint

REPO = Path(__file__).resolve().parents[1]
RUN = "runs/tiny"
"""The run folder, in the home that `make_home` makes."""
BEST, LATEST = 8, 12

CONFIG = """
from jaxlm.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(
        vocab_size=512, num_layers=2, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16
    ),
    data=DataConfig(source="text:texts/*.txt", eval_tokens=1000),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    checkpoint=CheckpointConfig(save_interval=4),
    num_steps=8,
    batch_size=8,
    seq_len=32,
    eval_interval=4,
    log_interval=2,
)
"""


def make_home(home: Path) -> Path:
    """Where a user stands: `launch.py`, `configs/tiny.py`, and some text."""
    (home / "configs").mkdir(parents=True)
    (home / "texts").mkdir()
    (home / "configs" / "tiny.py").write_text(CONFIG)
    shutil.copy(REPO / "launch.py", home)
    words = random.Random(0)
    lexicon = ["".join(words.choices("aeinorst", k=words.randint(2, 7))) for _ in range(300)]
    for number in range(24):
        text = " ".join(words.choices(lexicon, k=400))
        (home / "texts" / f"{number:02}.txt").write_text(text)
    return home


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Relative paths mean what they would mean to a user there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def launched(home: Path, flags: str) -> tuple[int, str]:
    """Exit code and output of `python launch.py --config configs/tiny.py FLAGS`, in process."""
    with working_in(home), contextlib.redirect_stdout(io.StringIO()) as out:
        code = launch.main(["--config", "configs/tiny.py", *shlex.split(flags)])
    return code, out.getvalue()


def make_run(home: Path) -> None:
    """Both plans of the run."""
    assert launched(home, "")[0] == 0
    assert launched(home, "--num_steps 12 --optim.learning_rate 3")[0] == 0
    best = min(eval_losses(home / RUN).items(), key=lambda item: item[1])[0]
    assert best == BEST, "the tests need a run whose best is not its last"


def save_model(run: Path, model: ModelConfig) -> Any:
    """Makes a run whose one step holds weights of the scale of trained ones; returns the model."""
    text = ["the cat sat on the mat and the other cats did not, which was 12,345 times as odd"] * 4
    tokenizer = train_tokenizer(text, model.vocab_size)
    trained = transformer(model)
    config = Config(model=model, optim=OptimConfig(), data=DataConfig("text:x"), run_dir=str(run))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    blueprint = make_blueprint(lambda _: trained, partial(make_optimizer, config.optim), mesh)
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(), on_commit=lambda *_: None)
    metadata = Metadata(
        step=3,
        tokens_seen=12_288,
        eval_loss=2.5,
        best_eval_loss=2.5,
        best_step=3,
        num_worse_evals=0,
        final=True,
        config=to_dict(config),
        data={"main": {"fingerprint": "abc", "source": "text:x", "limits": [9], "eval_tokens": 9}},
        phases=[{"step": 0, "shares": {"main": 1}, "stages": {}}],
        eval_set="eval",
        bytes_per_token=None,
        eos_id=tokenizer.token_to_id("<|endoftext|>"),
        environment={"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
        tracking_run_id="",
        lineage=[],
    )
    with checkpoints:
        checkpoints.save(blueprint.make(0), metadata)
    tokenizer.save(str(run / "checkpoints" / "tokenizer.json"))
    return trained


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def eval_losses(run: Path) -> dict[int, float]:
    """Step -> held-out loss, as metrics.jsonl has it."""
    return {row["step"]: row["eval/loss"] for row in rows(run) if "eval/loss" in row}


def damage(checkpoint: Path, item: str = "params") -> Path:
    """Flips one bit in the largest array file of an item; returns the file."""
    files = (path for path in (checkpoint / item).rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest


def give_to_another_run(step_folder: Path) -> None:
    """Makes a step one of another run, as a copy into the wrong folder is."""
    rewrite(step_folder, run_id="another")


def rewrite(step_folder: Path, **values: Any) -> None:
    """Changes what a step says of itself; it stays sound in itself."""
    path = step_folder / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    (step_folder / manifest.NAME).unlink()
    manifest.write_manifest(step_folder)
