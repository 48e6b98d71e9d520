"""The machine that every test sees: eight CPU devices, strict shapes, a cache of its own."""

import os
from collections.abc import Iterator

import pytest

NUM_DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={NUM_DEVICES}"
)
# XLA sizes its thread pool by this. With one thread a core, eight devices on two cores wait for
# each other in a collective for ever.
os.environ["NPROC"] = "32"

import jax  # noqa: E402  (after what it reads at import)

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write tests/golden/*.npz anew from transformers (needs torch)",
    )


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache; a child process inherits the setting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
