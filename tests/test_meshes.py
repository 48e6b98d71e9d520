"""A state that was saved on one mesh goes on over any other."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import (
    NUM_STEPS,
    ONE_DEVICE,
    OPTIM,
    ROWS,
    blueprint_of,
    host_batch,
    mesh_of,
    metadata_of,
    put,
)

from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.restore import items_of
from jaxlm.config import CheckpointConfig
from jaxlm.device.fingerprint import fingerprint
from jaxlm.device.loss import next_token_loss
from jaxlm.device.optim import make_schedule
from jaxlm.device.state import TrainState
from jaxlm.device.step import make_train_step, scheduled

pytestmark = pytest.mark.slow  # a compilation for each mesh

SAVED_ON = (8, 1, 1)
SAVED_AT, LAST = 3, 6
Shape = tuple[int, int, int]


@functools.cache
def step_on(shape: Shape) -> Any:
    mesh = mesh_of(*shape)
    update = make_train_step(blueprint_of(shape), next_token_loss(), mesh)
    return scheduled(update, make_schedule(OPTIM, NUM_STEPS), mesh)


def go_on(state: TrainState, shape: Shape, first: int, last: int) -> tuple[TrainState, list[float]]:
    """The state after more steps, and their losses."""
    losses = []
    for index in range(first, last):
        state, metrics = step_on(shape)(state, put(host_batch(index), mesh_of(*shape)))
        losses.append(float(metrics["loss"]))
    return state, losses


def opened(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(), on_commit=lambda *told: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[float]]:
    """A checkpoint of step 3, its fingerprints, and the losses of the steps after it."""
    folder = tmp_path_factory.mktemp("saved")
    state, _ = go_on(blueprint_of(SAVED_ON).make(0), SAVED_ON, 0, SAVED_AT)
    with opened(folder) as checkpoints:
        checkpoints.save(state, metadata_of(SAVED_AT))
    before = fingerprint(items_of(state))
    return folder, before, go_on(state, SAVED_ON, SAVED_AT, LAST)[1]


@pytest.mark.parametrize("shape", [SAVED_ON, (4, 2, 1), (2, 2, 2), (1, 4, 2), ONE_DEVICE])
def test_a_state_goes_on_over_any_mesh(saved: Any, shape: Shape) -> None:
    folder, before, expected = saved
    with opened(folder) as checkpoints:
        restored = checkpoints.restore_latest(blueprint_of(shape).abstract)
    assert restored is not None
    state, _ = restored
    assert {x.sharding.num_devices for x in jax.tree.leaves(state)} == {math.prod(shape)}
    assert fingerprint(items_of(state)) == before
    _, losses = go_on(state, shape, SAVED_AT, LAST)
    np.testing.assert_allclose(losses, expected, rtol=0 if shape == SAVED_ON else 1e-5)


def test_the_comparison_sees_one_row_of_another_batch(saved: Any) -> None:
    folder, _, expected = saved
    with opened(folder) as checkpoints:
        restored = checkpoints.restore_latest(blueprint_of(SAVED_ON).abstract)
    assert restored is not None
    batch = host_batch(SAVED_AT)
    for name, values in batch.items():
        values[ROWS - 1] = host_batch(LAST)[name][ROWS - 1]
    _, metrics = step_on(SAVED_ON)(restored[0], put(batch, mesh_of(*SAVED_ON)))
    assert not np.allclose(float(metrics["loss"]), expected[0], rtol=1e-5)
