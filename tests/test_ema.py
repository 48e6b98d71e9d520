"""The moving average of the weights: an item of the state that is used where there is one."""

import functools
import io
import os
import shutil
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import text_run
from flax import nnx
from safetensors.numpy import load_file
from tiny_model import (
    ONE_DEVICE,
    OPTIM,
    Bigram,
    blueprint_of,
    host_batch,
    mesh_of,
    names_and_leaves,
    put,
)
from tiny_run import Table, TinyBatches, tiny_config, train_table

from jaxlm import __main__ as jaxlm_cli
from jaxlm.checkpoints.folder import read_metadata, select
from jaxlm.checkpoints.restore import items_of, restore_numpy, restore_state
from jaxlm.checkpoints.verify import verify_step
from jaxlm.config import Config, OptimConfig
from jaxlm.device.fingerprint import fingerprint
from jaxlm.device.loss import next_token_loss
from jaxlm.device.optim import make_optimizer, make_schedule
from jaxlm.device.state import make_blueprint, num_bytes
from jaxlm.device.step import make_train_step, scheduled
from jaxlm.evaluation.average import average
from jaxlm.evaluation.score import score
from jaxlm.inference.load import load_model
from jaxlm.plan.ahead import examine_step
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints

DECAY = 0.7


@functools.cache
def averaged(shape=ONE_DEVICE):
    return make_blueprint(
        Bigram, functools.partial(make_optimizer, OPTIM), mesh_of(*shape), ema=True
    )


def config_of(run_dir: Path, decay: float | None = DECAY, **changes: Any) -> Config:
    config = tiny_config(run_dir, **{"num_steps": 6, "eval_interval": 2, **changes})
    return replace(config, optim=replace(config.optim, name="adamw", ema_decay=decay))


def arrays(path: Path, item: str) -> dict[str, np.ndarray]:
    return names_and_leaves(restore_numpy(path, [item])[item])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys() and a
    return all(np.array_equal(a[name], b[name]) for name in a)


# --- on the device


def test_the_state_has_it_beside_all_else():
    without = list(names_and_leaves(blueprint_of(model=Bigram).abstract))
    assert list(names_and_leaves(averaged().abstract)) == [
        *without,
        "ema_params/bias_V",
        "ema_params/table_VV",
    ]


@pytest.mark.parametrize("shape", [ONE_DEVICE, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_it_is_the_recursion_on_any_mesh_and_split_as_the_params(shape):
    blueprint, mesh = averaged(shape), mesh_of(*shape)
    update = make_train_step(blueprint, next_token_loss(), mesh, ema_decay=0.25)
    step = scheduled(update, make_schedule(OPTIM, 10), mesh)
    plain = make_train_step(blueprint_of(shape, Bigram), next_token_loss(), mesh)
    step_without = scheduled(plain, make_schedule(OPTIM, 10), mesh)
    state, without = blueprint.make(0), blueprint_of(shape, Bigram).make(0)
    expected = np.asarray(state.params["table_VV"], np.float64)
    for n, decay in enumerate([0.1, 2 / 11, 0.25, 0.25]):  # (1 + n) / (10 + n), up to 0.25
        state, _ = step(state, put(host_batch(n), mesh))
        without, _ = step_without(without, put(host_batch(n), mesh))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["table_VV"])
    np.testing.assert_allclose(state.ema_params["table_VV"], expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(state.params["table_VV"], expected, rtol=1e-5, atol=1e-7)
    assert fingerprint(state.params) == fingerprint(without.params)
    for name, leaf in names_and_leaves(state.params).items():
        twin = names_and_leaves(state.ema_params)[name]
        assert twin.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_a_step_that_is_not_finite_leaves_it_alone():
    def broken_by_31(model, batch):
        total, count = next_token_loss()(model, batch)
        return total * jax.numpy.where((batch["inputs"] == 31).all(), jax.numpy.nan, 1.0), count

    mesh = mesh_of(*ONE_DEVICE)
    update = make_train_step(averaged(), broken_by_31, mesh, ema_decay=DECAY)
    step = scheduled(update, make_schedule(OPTIM, 10), mesh)
    state, _ = step(averaged().make(0), put(host_batch(0), mesh))
    before = fingerprint(state.ema_params)
    assert before != fingerprint(state.params)  # so another average with them would show
    bad = {name: np.full_like(x, 31) for name, x in host_batch(1).items()}
    state, _ = step(state, put(bad, mesh))
    assert int(state.guard.skipped_steps) == 1
    assert fingerprint(state.ema_params) == before
    state, _ = step(state, put(host_batch(2), mesh))
    assert fingerprint(state.ema_params) != before


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(
        ValueError, match=r"^optim.ema_decay: found .*, expected at least 0 and below 1"
    ):
        OptimConfig(ema_decay=decay)


# --- in a run


class _StopAtOnce(TinyBatches):
    """Sends SIGTERM as soon as the loop asks for its first batch."""

    sent = False

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        if not self.sent and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(index, rows)


def one_step(config: Config) -> int:
    return train_table(config, batches=_StopAtOnce()).step


def stop_at(config: Config, step: int) -> None:
    assert [one_step(config) for _ in range(step)][-1] == step


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    assert train_table(config_of(run_dir)).complete
    return run_dir


@pytest.mark.slow
def test_stopped_after_every_step_it_ends_with_the_same_bits(straight, tmp_path):
    steps = [one_step(config_of(tmp_path)) for _ in range(6)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert train_table(config_of(tmp_path)).complete  # the eval of the end
    assert diff_checkpoints(f"{tmp_path}@6", f"{straight}@6") == []
    assert untimed_rows(tmp_path) == untimed_rows(straight)
    path = straight / "checkpoints" / "6"
    assert not same(arrays(path, "params"), arrays(path, "ema_params"))


@pytest.mark.slow
def test_the_run_without_it_has_the_same_params_and_other_evals(straight, tmp_path):
    train_table(config_of(tmp_path, None))
    difference = {
        found.name.split("/")[0] for found in diff_checkpoints(str(tmp_path), str(straight))
    }
    assert difference == {"ema_params"}
    evals, others = text_run.eval_losses(straight), text_run.eval_losses(tmp_path)
    assert evals.keys() == others.keys() and all(evals[step] != others[step] for step in evals)
    item_files = [p.name for p in (tmp_path / "checkpoints" / "6").iterdir()]
    assert "ema_params" not in item_files


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_average(straight):
    path = straight / "checkpoints" / "6"
    metadata = read_metadata(straight / "checkpoints", 6)
    expected = {n: f for n, f in metadata.fingerprints.items() if n.startswith("ema_params/")}
    config = metadata.run_config()
    for shape in (ONE_DEVICE, (2, 4, 1)):
        optimizer = functools.partial(make_optimizer, config.optim)
        abstract = make_blueprint(Table, optimizer, mesh_of(*shape), ema=True).abstract
        found = fingerprint(items_of(restore_state(path, metadata, abstract)))
        assert {n: f for n, f in found.items() if n.startswith("ema_params/")} == expected


@pytest.mark.slow
def test_a_resume_begins_it_with_the_params_and_another_drops_it(straight, tmp_path, capsys):
    stop_at(config_of(tmp_path, None), 3)
    folder = tmp_path / "checkpoints"
    params = arrays(folder / "3", "params")
    # Begun: after one more step it is one update away from the params of step 3.
    assert one_step(config_of(tmp_path)) == 4
    assert "changed from step 3 on: optim.ema_decay: was None, is 0.7" in capsys.readouterr().out
    decay = (1 + 3) / (10 + 3)
    for name, found in arrays(folder / "4", "ema_params").items():
        after = arrays(folder / "4", "params")[name]
        np.testing.assert_allclose(
            found, decay * params[name] + (1 - decay) * after, rtol=1e-5, atol=1e-7
        )
        assert not np.array_equal(found, after)
    assert one_step(config_of(tmp_path, None)) == 5
    assert "optim.ema_decay: was 0.7, is None" in capsys.readouterr().out
    assert not (folder / "5" / "ema_params").exists()
    lineage = read_metadata(folder, 5).lineage
    assert [entry["step"] for entry in lineage] == [3, 4]
    train_table(config_of(tmp_path, None))
    differing = diff_checkpoints(f"{tmp_path}@6", f"{straight}@6")
    assert {found.name.split("/")[0] for found in differing} == {"ema_params"}


@pytest.mark.slow
def test_dropped_where_the_plan_ends_it_stays_with_its_loss(straight, tmp_path):
    # Nothing is trained any more: the checkpoint would otherwise hold the params, and its loss.
    run = shutil.copytree(straight, tmp_path / "run")
    shorter = replace(config_of(run, None), num_steps=4)
    for step in (5, 6):
        shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
    before = read_metadata(run / "checkpoints", 4)
    assert before.eval_loss is not None and not before.final
    assert train_table(shorter).complete
    assert read_metadata(run / "checkpoints", 4) == before


@pytest.mark.slow
def test_a_branch_takes_the_average_and_weights_alone_are_the_average(straight, tmp_path):
    average_of = arrays(straight / "checkpoints" / "4", "ema_params")
    source = f"{straight}@4"
    branch = config_of(tmp_path / "branch", branch_from=source)
    train_table(branch)
    assert diff_checkpoints(f"{tmp_path / 'branch'}@6", f"{straight}@6") == []
    # With a rate of nothing a step shows what it began with.
    for name, decay in (("plain", None), ("averaged", DECAY)):
        config = config_of(tmp_path / name, decay, init_from=source, num_steps=1)
        optim = replace(config.optim, learning_rate=1e-30, warmup_steps=0)
        train_table(replace(config, optim=optim))
        path = tmp_path / name / "checkpoints" / "1"
        assert same(arrays(path, "params"), average_of)
        assert (path / "ema_params").exists() == (decay is not None)
    for a, b in zip(arrays(path, "ema_params").values(), average_of.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # And without an average of its own, a branch goes on with the params.
    plain = config_of(tmp_path / "plain_branch", None, branch_from=source)
    train_table(plain)
    differing = diff_checkpoints(f"{tmp_path / 'plain_branch'}@6", f"{straight}@6")
    assert {found.name.split("/")[0] for found in differing} == {"ema_params"}


@pytest.mark.slow
def test_resume_best_goes_back_with_it(straight, tmp_path):
    stop_at(config_of(tmp_path), 5)
    best = select(f"{tmp_path}@best").step
    assert best < 5
    going_back = config_of(tmp_path, resume="best")
    train_table(going_back)
    assert diff_checkpoints(f"{tmp_path}@6", f"{straight}@6") == []


# --- what uses a checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a run of a moving average in it."""
    home = text_run.make_home(tmp_path_factory.mktemp("ema") / "home")
    small = "--model.num_layers 1 --optim.name adamw --mesh.data 8"
    code, _ = text_run.launched(home, f"--optim.ema_decay 0.9 --run_dir runs/ema {small}")
    assert code == 0
    return home


def cli(*words: str) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as out:
        code = jaxlm_cli.command(list(words))
    return code, out.getvalue()


def test_all_use_of_a_checkpoint_is_that_of_its_average(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    path = Path("runs/ema/checkpoints/8")
    weights, params = arrays(path, "ema_params"), arrays(path, "params")
    assert not same(weights, params)
    model, _ = load_model("runs/ema@8")
    assert same(names_and_leaves(nnx.to_pure_dict(nnx.state(model))), weights)
    (found,) = score(["runs/ema@8"])
    assert found.loss == found.recorded_loss == text_run.eval_losses(Path("runs/ema"))[8]
    made = average("runs/ema", steps=[4, 8], out=str(tmp_path / "mean"))
    mean = arrays(made.folder / "checkpoints" / "8", "params")
    older = arrays(Path("runs/ema/checkpoints/4"), "ema_params")
    for name, leaf in mean.items():
        np.testing.assert_allclose(leaf, (weights[name] + older[name]) / 2, rtol=1e-6, atol=1e-8)
    assert load_model(str(made.folder))[1].step == 8


@pytest.mark.slow
def test_the_commands_take_it(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    code, told = cli("checkpoints", "verify", "runs/ema", "--eval")
    assert code == 0 and "equal to the bit" in told
    assert cli("checkpoints", "copy", "runs/ema", str(tmp_path / "copy"))[0] == 0
    assert cli("checkpoints", "diff", str(tmp_path / "copy"), "runs/ema")[0] == 0
    assert cli("checkpoints", "diff", "runs/ema@4", "runs/ema@8")[0] == 1
    assert cli("export", "runs/ema", str(tmp_path / "hf"))[0] == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    best = select("runs/ema").path
    assert np.array_equal(exported, arrays(best, "ema_params")["embedding_VD"])
    assert not np.array_equal(exported, arrays(best, "params")["embedding_VD"])


def test_damage_in_it_is_seen(home, tmp_path):
    run = shutil.copytree(home / "runs" / "ema", tmp_path / "run")
    folder = run / "checkpoints"
    assert verify_step(folder, 8) == []
    text_run.damage(folder / "8", "ema_params")
    (damage,) = verify_step(folder, 8) or []
    assert damage.startswith("ema_params/")
    with pytest.raises(ValueError, match="damaged"):
        load_model(f"{run}@8")
    # Where the manifest agrees with it, the fingerprints do not.
    (folder / "8" / "manifest.json").unlink()
    text_run.manifest.write_manifest(folder / "8")
    with pytest.raises(ValueError, match="ema_params.*(differs from|cannot be read)"):
        load_model(f"{run}@8")


@pytest.mark.slow
def test_memory_and_disk_count_it():
    config = tiny_config("runs/x")
    with_it = replace(config, optim=replace(config.optim, ema_decay=0.9))
    memory, more = (examine_step(c, jax.devices()[:1])["memory"] for c in (config, with_it))
    assert more["average"] == more["params"] == memory["params"] > 0 and "average" not in memory
    assert more["batch_and_padding"] == memory["batch_and_padding"]
    params = num_bytes(averaged().abstract.params)
    assert num_bytes(averaged().abstract) == num_bytes(blueprint_of(model=Bigram).abstract) + params
