"""What a caller puts in place of a config's parts works, resumes to the bit, or is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_train import _StopAtOnce
from tiny_run import BATCH, SEQ, VOCAB, Table, TinyBatches, TinyEvalSet, tiny_config, train_table

from jaxlm import Hook, Tracker, load_model
from jaxlm.checkpoints.restore import restore_numpy
from jaxlm.device.loss import cross_entropy
from jaxlm.device.state import TrainState
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints

SHORT: dict[str, Any] = {"num_steps": 4, "eval_interval": 2}


def with_accuracy(model: Any, batch: Any) -> Any:
    logits = model(batch["inputs"])
    right = jnp.sum(logits.argmax(-1) == batch["targets"]).astype(jnp.float32)
    losses = cross_entropy(logits, batch["targets"])
    return losses.sum(), jnp.float32(losses.size), {"accuracy": right}


class Two(Table):
    """A table, and a vector beside it."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.bias_V = nnx.Param(jnp.ones((VOCAB,)))

    def __call__(self, tokens_BT: Any, segment_ids_BT: Any = None) -> jax.Array:
        return super().__call__(tokens_BT) + self.bias_V[...][None, None]


class Dropping(Table):
    """A table whose logits drop out."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, tokens_BT: Any, segment_ids_BT: Any = None, rngs: Any = None) -> jax.Array:
        logits = super().__call__(tokens_BT)
        return self.dropout(logits, rngs=rngs, deterministic=rngs is None)


def params_of(run: Path, step: int = 4) -> dict[str, np.ndarray]:
    return restore_numpy(run / "checkpoints" / str(step), ["params"])["params"]


def stop_at_each_step(run: Path, **parts: Any) -> None:
    for step in range(4):
        batches = _StopAtOnce(step)
        assert train_table(tiny_config(run, **SHORT), batches=batches, **parts).step == step + 1
    assert train_table(tiny_config(run, **SHORT), **parts).complete


@pytest.mark.slow
def test_metrics_of_a_loss_have_rows_and_change_no_bit(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "measured", **SHORT, num_microbatches=2)
    train_table(config, loss=with_accuracy)
    rows = untimed_rows(tmp_path / "measured")
    for kind in ("train", "eval"):
        found = [row[f"{kind}/accuracy"] for row in rows if f"{kind}/loss" in row]
        assert all(0 <= accuracy < 1 for accuracy in found) and found[-1] > 0.1

    def without(model: Any, batch: Any) -> Any:
        return with_accuracy(model, batch)[:2]

    train_table(tiny_config(tmp_path / "plain", **SHORT, num_microbatches=2), loss=without)
    assert diff_checkpoints(str(tmp_path / "plain"), str(tmp_path / "measured")) == []


def test_an_optimizer_of_ones_own_makes_its_updates_and_resumes(tmp_path: Path) -> None:
    tx = optax.adamw(optax.linear_schedule(0.1, 0.01, 4), weight_decay=0.5)
    train_table(tiny_config(tmp_path / "a", **SHORT), optimizer=tx)
    assert all("train/learning_rate" not in row for row in untimed_rows(tmp_path / "a"))

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = 30 * params["table_VV"][batch["inputs"]]
            return cross_entropy(logits, batch["targets"]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params: Any = initial_params(Table)
    opt_state = jax.jit(tx.init)(params)
    for index in range(4):
        params, opt_state = step(params, opt_state, TinyBatches()(index, slice(None)))
    found = params_of(tmp_path / "a")["table_VV"]
    np.testing.assert_allclose(found, params["table_VV"], rtol=1e-4, atol=1e-6)

    stop_at_each_step(tmp_path / "b", optimizer=tx)
    assert diff_checkpoints(f"{tmp_path / 'a'}@4", f"{tmp_path / 'b'}@4") == []


def key() -> jax.Array:
    return jax.random.key(np.uint32(tiny_config("unused").seed))


def initial_params(model: Any) -> Any:
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(model(nnx.Rngs(params=key())))))()


@pytest.mark.parametrize("optimizer", [None, optax.adamw(0.1, weight_decay=0.5)])
def test_frozen_params_keep_their_bits(tmp_path: Path, optimizer: Any) -> None:
    parts: dict[str, Any] = {"model": Two, "optimizer": optimizer}
    train_table(tiny_config(tmp_path, **SHORT), frozen=lambda name: name == "table_VV", **parts)
    found, initial = params_of(tmp_path), initial_params(Two)
    np.testing.assert_array_equal(found["table_VV"], initial["table_VV"])
    assert not np.array_equal(found["bias_V"], initial["bias_V"])


def test_dropout_resumes_to_the_bit_and_evals_drop_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "a", **SHORT)
    train_table(config, model=Dropping)
    stop_at_each_step(tmp_path / "b", model=Dropping)
    assert diff_checkpoints(f"{tmp_path / 'a'}@4", f"{tmp_path / 'b'}@4") == []
    assert untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    # The controls: it drops, and by the seed.
    train_table(tiny_config(tmp_path / "whole", **SHORT))
    assert diff_checkpoints(str(tmp_path / "a"), str(tmp_path / "whole")) != []
    batch = TinyEvalSet()(0, slice(None))
    model, _ = load_model(str(tmp_path / "a"), model=Dropping)
    twice = [np.asarray(model(batch["inputs"])) for _ in range(2)]
    np.testing.assert_array_equal(*twice)


@pytest.mark.slow
def test_each_microbatch_draws_its_own(tmp_path: Path) -> None:
    drawn: dict[int, float] = {}

    def noisy(model: Any, batch: Any, key: Any) -> Any:
        losses = cross_entropy(model(batch["inputs"]), batch["targets"])
        drawn_now = 0.0 if key is None else jax.random.uniform(key)
        return losses.sum(), jnp.float32(losses.size), {"drawn": jnp.float32(drawn_now)}

    for parts in (1, 2):
        config = tiny_config(tmp_path / str(parts), **SHORT, num_microbatches=parts)
        train_table(config, loss=noisy)
        rows = [row for row in untimed_rows(tmp_path / str(parts)) if "train/drawn" in row]
        drawn |= {parts: rows[0]["train/drawn"] * BATCH * SEQ}
        assert len({row["train/drawn"] for row in rows}) == len(rows)
    keys = jax.random.split(jax.random.fold_in(key(), 0), 2)
    assert drawn[1] == pytest.approx(float(jax.random.uniform(jax.random.fold_in(key(), 0))), 1e-5)
    assert drawn[2] == pytest.approx(float(sum(map(jax.random.uniform, keys))), 1e-5)


def test_of_several_held_out_sets_the_first_decides(tmp_path: Path) -> None:
    class Far(TinyEvalSet):
        def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
            batch = super().__call__(index, rows)
            return {**batch, "targets": (batch["targets"] + 7) % VOCAB}

    sets = {"near": TinyEvalSet(), "far": Far()}
    result = train_table(tiny_config(tmp_path / "two", **SHORT), eval_batches=sets)
    train_table(tiny_config(tmp_path / "one", **SHORT))
    rows = [row for row in untimed_rows(tmp_path / "two") if "eval/loss" in row]
    assert [row["eval/far/loss"] > row["eval/loss"] for row in rows] == [True, True]
    others = [
        {name: value for name, value in row.items() if "far" not in name and "near" not in name}
        for row in untimed_rows(tmp_path / "two")
    ]
    assert others == untimed_rows(tmp_path / "one")
    assert all(row["eval/near/loss"] == row["eval/loss"] for row in rows)
    assert result.best is not None and result.best.loss == rows[-1]["eval/loss"]


@pytest.mark.slow
def test_the_best_is_never_judged_by_another_held_out_set(tmp_path: Path) -> None:
    class Marked(TinyEvalSet):
        def __init__(self, fingerprint: str) -> None:
            self.fingerprint = fingerprint

    near, far = Marked("1a"), Marked("2b")
    short, longer = (tiny_config(tmp_path, **{**SHORT, "num_steps": n}) for n in (4, 8))
    train_table(short, eval_batches={"near": near, "far": far})
    for other, found in (
        ({"far": far, "near": near}, "far 2b"),
        ({"near": far}, "near 2b"),
        (near, "main 1a"),
    ):
        with pytest.raises(ValueError, match=f"found {found} to judge best by, .* it was near 1a;"):
            train_table(longer, eval_batches=other)
    between = tiny_config(tmp_path, **{**SHORT, "num_steps": 6})
    assert train_table(between, eval_batches=None).complete  # none, and then the same set again
    assert train_table(longer, eval_batches={"near": near}).complete


def test_evals_may_have_a_loss_of_their_own(tmp_path: Path) -> None:
    def doubled(model: Any, batch: Any) -> Any:
        total, count, _ = with_accuracy(model, batch)
        return 2 * total, count

    train_table(tiny_config(tmp_path / "a", **SHORT), eval_loss=doubled)
    train_table(tiny_config(tmp_path / "b", **SHORT))
    losses = [
        [row["eval/loss"] for row in untimed_rows(tmp_path / run) if "eval/loss" in row]
        for run in ("a", "b")
    ]
    np.testing.assert_allclose(losses[0], 2 * np.array(losses[1]), rtol=1e-6)


def test_a_hook_has_the_state_after_its_step_and_its_row(tmp_path: Path) -> None:
    seen: dict[int, tuple[int, np.ndarray, dict[str, float]]] = {}

    def look(step: int, state: TrainState, row: dict[str, float]) -> None:
        seen[step] = int(state.step), np.asarray(state.params["table_VV"]), row

    config = tiny_config(tmp_path, **SHORT, checkpoint={"save_interval": 2}, log_interval=4)
    train_table(config, hooks=[Hook(look, every=2)])
    assert {step: at for step, (at, _, _) in seen.items()} == {2: 2, 4: 4}
    for step, (_, table, _) in seen.items():
        np.testing.assert_array_equal(table, params_of(tmp_path, step)["table_VV"])
    assert seen[2][2] == {} and seen[4][2]["train/loss"] > 0


def mean_loss(model: Any, batch: Any) -> Any:
    return cross_entropy(model(batch["inputs"]), batch["targets"]).mean()


def shaped(model: Any, batch: Any) -> Any:
    losses = cross_entropy(model(batch["inputs"]), batch["targets"])
    return losses, jnp.float32(losses.size)


class Narrow(Table):
    def __call__(self, tokens_BT: Any, segment_ids_BT: Any = None) -> jax.Array:
        return super().__call__(tokens_BT)[..., :7]


class OneArgument(Table):
    def __call__(self, tokens_BT: Any) -> jax.Array:  # pyright: ignore
        return super().__call__(tokens_BT)


class Stateful(Table):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class NoBatches(TinyEvalSet):
    def __len__(self) -> int:
        return 0


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a loss that is a mean": (
        {"loss": mean_loss},
        "^loss: found a ShapeDtypeStruct, expected .*sum",
    ),
    "four values": ({"loss": lambda m, b: (1.0, 2, {}, {})}, "^loss: found a tuple of 4, expected"),
    "a loss of each token": ({"loss": shaped}, r"^loss: found a sum float32 \[8, 16\], expected"),
    "a dict without the loss": (
        {"loss": lambda m, b: ({"a": 1.0}, 2)},
        "^loss: found sums of a, e",
    ),
    "metrics in no dict": ({"loss": lambda m, b: (1.0, 2, 3.0)}, "^loss: found a third value that"),
    "a metric named as another": (
        {"loss": lambda m, b: (jnp.float32(1), 2, {"grad_norm": jnp.float32(1)})},
        "^loss: found the name grad_norm, which is taken",
    ),
    "a metric named loss": (
        {"loss": lambda m, b: (jnp.float32(1), 2, {"loss": jnp.float32(1)})},
        "^loss: found the name loss, which is taken",
    ),
    "a loss of the batch alone": (
        {"loss": lambda b: 0},
        r"^loss: expected to be called as loss\(m",
    ),
    "an eval loss that is a mean": (
        {"eval_loss": mean_loss},
        "^eval_loss: found a ShapeDtypeStruct",
    ),
    "an optimizer that needs the loss": (
        {"optimizer": optax.lbfgs(1e-3)},
        r"^optimizer: expected to be called as .*update\(gradients, state, params\), .*'value'",
    ),
    "an instance": ({"model": Table(nnx.Rngs(0))}, "^model: found an instance of Table, expected"),
    "a model of tokens alone": (
        {"model": OneArgument},
        r"^model: expected to be called as model\(",
    ),
    "a stateful dropout": (
        {"model": Stateful},
        "^model: found more randomness than for params; .* `rngs` of __c",
    ),
    "too few logits": (
        {"model": Narrow},
        r"^model: found logits for 7 tokens, expected at least \d",
    ),
    "a generator": (
        {"batches": (x for x in ())},
        "^batches: found a generator, expected a function",
    ),
    "a dict of arrays": ({"batches": {"inputs": 1}}, "^batches: found a dict, expected a function"),
    "a list of evals": ({"eval_batches": [1]}, "^eval_batches: found a list, expected a function"),
    "an empty set among several": (
        {"eval_batches": {"near": TinyEvalSet(), "none": NoBatches()}},
        r"^eval_batches\['none'\]: found no batch, expected at least one",
    ),
    "a hook every no step": (
        {"hooks": [Hook(print, every=0)]},
        "^hooks: found every=0, expected at least 1",
    ),
    "a random key in the optimizer": (
        {"optimizer": optax.add_noise(0.1, 0.5, key=jax.random.key(3))},
        "^optimizer: found key<fry> in its state .*PRNGKey",
    ),
    "no inputs": (
        {"batches": lambda i, rows: {"x": np.ones((8, 2))[rows]}},
        "^batches: found x, exp",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_first_mistake_is_one_line_that_names_it(tmp_path: Path, mistake: str) -> None:
    parts, line = MISTAKES[mistake]
    with pytest.raises(ValueError, match=line):
        train_table(tiny_config(tmp_path / "run", **SHORT), **parts)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_an_optimizer_may_hold_less_than_a_param_for_each(tmp_path: Path) -> None:
    tx = optax.adafactor(0.1, min_dim_size_to_factor=8)
    train_table(tiny_config(tmp_path / "a", **SHORT), optimizer=tx)
    stop_at_each_step(tmp_path / "b", optimizer=tx)
    assert diff_checkpoints(f"{tmp_path / 'a'}@4", f"{tmp_path / 'b'}@4") == []
    state = restore_numpy(tmp_path / "a/checkpoints/4", ["opt_state"])["opt_state"]
    assert (VOCAB,) in {leaf.shape for leaf in jax.tree.leaves(state)}


def test_what_was_own_must_be_given_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SHORT)
    train_table(config, optimizer=optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="one of your own: pass it again, as `model` or `optimize"):
        train_table(tiny_config(tmp_path, **SHORT | {"num_steps": 5}))
    with pytest.raises(ValueError, match="one of your own: pass it again, as `model` or `optimize"):
        load_model(str(tmp_path))


def test_a_tracker_of_ones_own_has_each_row_once_and_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[list[tuple[int, float]]] = []

    class Curve(Tracker):
        def __init__(self, config: Any, history: Any) -> None:
            kept.append(
                [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
            )

        def log(self, step: int, row: Any) -> None:
            if "train/loss" in row:
                kept[-1].append((step, row["train/loss"]))

    class Broken(Tracker):
        def __init__(self, config: Any, history: Any) -> None: ...

        def log(self, step: int, row: Any) -> None:
            raise OSError("its server is gone")

    stop_at_each_step(tmp_path, trackers=[Curve, Broken])
    rows = [row for row in untimed_rows(tmp_path) if "train/loss" in row]
    assert kept[-1] == [(row["step"], row["train/loss"]) for row in rows] and len(kept) == 5
    said = capsys.readouterr().out
    failure = "tracker 2 of your own failed; the run goes on without it (OSError: its server"
    assert said.count(failure) == 5


class InParts(Table):
    """A table that is read out in parts, with dropout before its end."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, tokens_BT: Any, segment_ids_BT: Any = None, rngs: Any = None) -> jax.Array:
        return self.readout()(self.hidden(tokens_BT, segment_ids_BT, rngs)[0])

    def hidden(self, tokens_BT: Any, segment_ids_BT: Any = None, rngs: Any = None) -> Any:
        logits = super().__call__(tokens_BT)
        return self.dropout(logits, rngs=rngs, deterministic=rngs is None), None

    def readout(self) -> Any:
        return lambda logits: logits


class HiddenWithoutRngs(Dropping):
    def hidden(self, tokens_BT: Any, segment_ids_BT: Any = None) -> Any:
        return self(tokens_BT), None


@pytest.mark.slow
def test_a_loss_in_chunks_drops_out_too(tmp_path: Path) -> None:
    for chunks in (1, 2):
        config = tiny_config(tmp_path / str(chunks), **SHORT, loss_chunks=chunks)
        train_table(config, model=InParts)
    rows = [untimed_rows(tmp_path / str(chunks)) for chunks in (1, 2)]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-4)
    config = tiny_config(tmp_path / "none", **SHORT, loss_chunks=2)
    with pytest.raises(ValueError, match="model: found `rngs` in `__call__` and not in `hidden`"):
        train_table(config, model=HiddenWithoutRngs)


@pytest.mark.slow
def test_an_optimizer_without_a_state_resumes(tmp_path: Path) -> None:
    train_table(tiny_config(tmp_path / "a", **SHORT), optimizer=optax.sgd(0.1))
    stop_at_each_step(tmp_path / "b", optimizer=optax.sgd(0.1))
    assert diff_checkpoints(f"{tmp_path / 'a'}@4", f"{tmp_path / 'b'}@4") == []


@pytest.mark.slow
def test_frozen_params_keep_their_bits_in_the_moving_average(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SHORT)
    config = replace(config, optim=replace(config.optim, ema_decay=0.7))
    train_table(config, model=Two, frozen=lambda name: name == "table_VV")
    average = restore_numpy(tmp_path / "checkpoints/4", ["ema_params"])["ema_params"]
    np.testing.assert_array_equal(average["table_VV"], params_of(tmp_path)["table_VV"])
    assert not np.array_equal(average["bias_V"], params_of(tmp_path)["bias_V"])


def test_a_tracker_that_changes_its_row_changes_no_other(tmp_path: Path) -> None:
    kept: list[int] = []

    class Clearing(Tracker):
        def __init__(self, config: Any, history: Any) -> None:
            history.clear()

        def log(self, step: int, row: Any) -> None:
            row.clear()

    class Counting(Clearing):
        def log(self, step: int, row: Any) -> None:
            kept.append(len(row))

    train_table(tiny_config(tmp_path, **SHORT), trackers=[Clearing, Counting])
    assert kept and min(kept) > 2
