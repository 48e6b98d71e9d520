"""All uses of private APIs of other packages.

The upper bounds of these packages in pyproject.toml are the versions that were checked.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


def coordination_client() -> Any:
    """JAX's client of the coordination service, in a process of a cluster."""
    from jax._src.distributed import global_state

    assert global_state.client is not None, "jax.distributed has not been started"
    return global_state.client


def wait_for_step_metadata(manager: Any) -> None:
    """Waits until Orbax's `CheckpointManager` has written a step's `_CHECKPOINT_METADATA`.

    Orbax writes this file in a background thread.
    """
    manager._non_blocking_metadata_store.wait_until_finished()


def set_help_colors(wanted: bool) -> None:
    """Turns ANSI codes in tyro's help and errors on or off."""
    import tyro

    tyro._experimental_options["ansi_codes"] = wanted


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which warns of normal conditions and logs errors that it also raises."""
    from absl import logging as absl_logging

    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def skip_orbax_byte_counts() -> None:
    """Keeps Orbax from asking TensorStore for its byte counts, in this whole process.

    TensorStore (0.1.86) never frees the lists that it answers with: 50 kB a save.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils.get_tensorstore_raw_bytes = lambda direction: 0
