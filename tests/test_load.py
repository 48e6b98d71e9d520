"""A model back from disk: the one that was asked for, proven, on any devices."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_run
from flax import nnx
from tiny_model import names_and_leaves

from jaxlm.checkpoints import restore
from jaxlm.checkpoints.folder import run_folder, select
from jaxlm.checkpoints.names import split_step
from jaxlm.checkpoints.restore import restore_numpy
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.device.sharding import make_mesh
from jaxlm.files.durable import check_output_path
from jaxlm.files.publish import check_free
from jaxlm.inference.load import load_model
from jaxlm.report.history import read_history

TOKENS_BT = np.random.RandomState(0).randint(0, 512, (8, 32)).astype(np.int32)


@jax.jit
def _forward(model: Any, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT)


def logits_of(model: Any) -> np.ndarray:
    return np.asarray(_forward(model, TOKENS_BT))


def mean_loss(logits_BTV: np.ndarray) -> float:
    log_probs = jax.nn.log_softmax(jnp.asarray(logits_BTV), axis=-1)
    targets_BT = jnp.asarray(TOKENS_BT)[:, 1:, None]
    return -float(jnp.take_along_axis(log_probs[:, :-1], targets_BT, axis=-1).mean())


@pytest.mark.parametrize(
    ("which", "step"),
    [
        ("", text_run.BEST),
        ("@best", text_run.BEST),
        ("@latest", text_run.LATEST),
        ("@final", text_run.LATEST),
        ("@4", 4),
    ],
)
def test_which_checkpoint(shared_home: Path, which: str, step: int, lines: list[str]):
    run = shared_home / text_run.RUN
    model, metadata = load_model(f"{run}{which}")
    losses = text_run.eval_losses(run)
    best = min(loss for at, loss in losses.items() if at <= step)
    assert (metadata.step, metadata.tokens_seen) == (step, step * 256)
    assert metadata.eval_loss == losses[step] and metadata.best_eval_loss == best
    assert lines == [
        f"Loaded step {step} of {run}/checkpoints",
        f"Best eval loss: {best:.4f}",
        f"Tokens seen: {step * 256 / 1e3:.1f} k",
    ]
    saved = restore_numpy(run / "checkpoints" / str(step))["params"]
    loaded = names_and_leaves(nnx.to_pure_dict(nnx.state(model)))
    saved = names_and_leaves(saved)
    assert loaded.keys() == saved.keys() and len(saved) > 10
    assert all(np.array_equal(loaded[name], saved[name]) for name in saved)


def test_final_is_the_end_of_the_last_completed_plan(own_home: Path):
    # Twelve steps are behind, and a plan of twenty is stopped by a save that is too late for it.
    checkpoints = own_home / text_run.RUN / "checkpoints"
    shutil.rmtree(checkpoints / "12")
    assert load_model(f"{own_home / text_run.RUN}@final")[1].step == 8
    with pytest.raises(ValueError, match=r"@final: there is no such checkpoint.*holds steps: 4$"):
        shutil.rmtree(checkpoints / "8")
        load_model(f"{own_home / text_run.RUN}@final")


@pytest.mark.slow
def test_the_same_model_on_eight_devices_and_on_one(
    shared_home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(shared_home)  # and by a relative path
    one_device = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    split = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(ValueError, match="kv_heads"):  # one key/value head is not for two devices
        load_model(text_run.RUN, mesh=split)
    meshes = [make_mesh(MeshConfig(data=4, fsdp=2)), one_device]
    models = [load_model(f"{text_run.RUN}@8", mesh=mesh)[0] for mesh in meshes]
    devices = [len(nnx.state(m)["embedding_VD"][...].sharding.device_set) for m in models]
    assert devices == [8, 1]
    eight, one = map(logits_of, models)
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    other = logits_of(load_model(f"{text_run.RUN}@4", mesh=one_device)[0])
    assert np.abs(other - one).max() > 0.01


def test_the_best_is_better_than_the_latest(shared_home: Path):
    run = shared_home / text_run.RUN
    best, latest = (logits_of(load_model(f"{run}@{w}")[0]) for w in ("best", "latest"))
    assert best.dtype == np.float32 and best.shape == (8, 32, 512)
    assert mean_loss(best) < mean_loss(latest)  # even of random tokens it is less sure


def test_only_weights_are_read(shared_home: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[set[str]] = []

    def spy(path: Path, metadata: Any, abstract: dict[str, Any]) -> dict[str, Any]:
        asked.append(set(abstract))
        return whole(path, metadata, abstract)

    whole = restore.restore_items
    monkeypatch.setattr(restore, "restore_items", spy)
    load_model(str(shared_home / text_run.RUN))
    assert asked == [{"params"}]


def test_a_damaged_best_is_said_and_passed_over(own_home: Path, lines: list[str]):
    run = own_home / text_run.RUN
    text_run.damage(run / "checkpoints/8")
    _, metadata = load_model(str(run))
    assert metadata.step == 4  # the next best, not the latest
    assert lines[0].startswith("Warning: step 8 is damaged (params/") and "checksum" in lines[0]
    assert lines[1] == f"Loaded step 4 of {run}/checkpoints"
    assert (run / "checkpoints/8").is_dir()  # whoever only reads moves nothing
    text_run.damage(run / "checkpoints/12")
    assert load_model(f"{run}@latest")[1].step == 4
    text_run.damage(run / "checkpoints/4")
    with pytest.raises(
        ValueError, match=r"@best: damaged \(step 4: params/.*; step 8: .*; step 12: "
    ):
        load_model(str(run))


def test_a_damaged_number_is_refused(own_home: Path):
    run = own_home / text_run.RUN
    name = text_run.damage(run / "checkpoints/8").relative_to(run / "checkpoints/8")
    message = rf"@8: damaged \(step 8: {name}: content differs.*holds steps: 4, 8, 12$"
    with pytest.raises(ValueError, match=message):
        load_model(f"{run}@8")
    assert load_model(f"{run}@12")[1].step == 12


def test_a_checkpoint_is_sound_as_a_whole_or_not(own_home: Path):
    # Its weights alone would still load, but nothing can tell a tidy-up from a disk that fails.
    run = own_home / text_run.RUN
    shutil.rmtree(run / "checkpoints/8/opt_state")
    with pytest.raises(ValueError, match=r"@8: damaged \(step 8: opt_state/.*: missing"):
        load_model(f"{run}@8")
    assert load_model(f"{run}@best")[1].step == 4


def test_a_run_or_step_that_is_not_there(shared_home: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: found no checkpoints"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"@7: there is no such .*holds steps: 4, 8, 12$"):
        load_model(f"{shared_home / text_run.RUN}@7")
    with pytest.raises(ValueError, match=r"@bset: expected @best, @latest, @final or @ and"):
        load_model(f"{shared_home / text_run.RUN}@bset")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="@best: there is no such .*holds steps: none"):
        load_model(str(tmp_path))


def test_the_checkpoint_folder_is_enough(shared_home: Path, tmp_path: Path):
    moved = shutil.copytree(shared_home / text_run.RUN / "checkpoints", tmp_path / "moved")
    model, metadata = load_model(str(moved))
    assert metadata.run_config().model == ModelConfig(
        vocab_size=512, num_layers=2, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16
    )
    original, _ = load_model(str(shared_home / text_run.RUN))
    np.testing.assert_array_equal(logits_of(model), logits_of(original))
    assert (moved / "tokenizer.json").is_file()


def test_another_model_is_refused(shared_home: Path):
    def wrong(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(4, 4, rngs=rngs)

    with pytest.raises(ValueError, match="params/bias holds nothing, but this model has"):
        load_model(str(shared_home / text_run.RUN), model=wrong)


def test_the_metadata_holds_what_a_script_needs(shared_home: Path):
    _, metadata = load_model(f"{shared_home / text_run.RUN}@latest")
    config = metadata.run_config()
    assert isinstance(config, Config) and config.num_steps == 12
    assert metadata.best_step == 8 and metadata.final and metadata.num_worse_evals == 1
    assert metadata.data["main"] and metadata.eos_id is not None
    assert metadata.environment["versions"]["jax"] == jax.__version__
    changed = metadata.lineage[0]["changed"]
    assert metadata.lineage[0]["step"] == 8
    assert any("optim.learning_rate: was 0.01, is 3.0" in change for change in changed)
    assert math.isfinite(metadata.best_eval_loss)


def test_an_at_sign_in_the_path_or_the_name_is_no_step(own_home: Path):
    run = own_home / "me@host" / "exp@lr1"
    run.parent.mkdir()
    (own_home / text_run.RUN).rename(run)
    for name, step in {"": text_run.BEST, "@4": 4, "@latest": text_run.LATEST}.items():
        assert load_model(f"{run}{name}")[1].step == step
    assert select(f"{run}/checkpoints").step == text_run.BEST
    assert split_step(f"{run}@best") == (str(run), "best")
    with pytest.raises(ValueError, match=r"exp@lr1@bst: expected @best, @latest, @final or @ and"):
        select(f"{run}@bst")
    with pytest.raises(ValueError, match=r"found no checkpoints, .* without a @STEP"):
        select(f"{run}-2@bst")
    run.rename(own_home / "exp@4")  # a folder of that name is what is meant
    assert select(f"{own_home}/exp@4", "latest").step == text_run.LATEST


def test_a_tilde_is_the_home_folder(shared_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(shared_home))
    found = select(f"~/{text_run.RUN}@4")
    assert found.path == shared_home / text_run.RUN / "checkpoints/4"
    assert run_folder(f"~/{text_run.RUN}", found.folder) == shared_home / text_run.RUN
    assert read_history(f"~/{text_run.RUN}").checkpoints
    assert (
        check_free("~/new") == shared_home / "new"
        and check_output_path(Path("~/x")) == shared_home / "x"
    )
