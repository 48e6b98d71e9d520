"""What no library makes public, and we need: each use of another package's insides is here.

The upper bounds of these packages in pyproject.toml name the versions that were looked at.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


def coordination_client() -> Any:
    """JAX's client of the coordination service, of a process of a cluster."""
    from jax._src.distributed import global_state

    assert global_state.client is not None, "jax.distributed has not been started"
    return global_state.client


def wait_for_step_metadata(manager: Any) -> None:
    """Waits until Orbax's `CheckpointManager` has written a step's `_CHECKPOINT_METADATA`.

    Orbax does so in a thread of its own.
    """
    manager._non_blocking_metadata_store.wait_until_finished()


def set_help_colors(wanted: bool) -> None:
    """Has tyro print its help and errors with ANSI codes, or without."""
    import tyro

    tyro._experimental_options["ansi_codes"] = wanted


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax logs nothing within: it warns of normal conditions, and logs what it also raises."""
    from absl import logging as absl_logging

    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)
