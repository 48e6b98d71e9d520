"""What every test sees: eight CPU devices, strict shapes, a cache and a terminal of its own."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

NUM_DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of a small run is the compiler's: LLVM, and MLIR for fusions, which an older XLA
# can do without.
FLAGS = [
    f"--xla_force_host_platform_device_count={NUM_DEVICES}",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# XLA sizes its thread pool by this. With one thread a core, eight devices on two cores wait for
# each other in a collective for ever.
os.environ["NPROC"] = "32"
# nohup ignores SIGHUP and a shell's background job SIGINT; each process that a test starts would
# inherit that, and train on after the signal that is to stop it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Help is laid out by the width of the terminal that the tests are run in.
os.environ["COLUMNS"] = "80"
# Without bytecode, each of the processes started below compiles all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# The same for processes that a test starts without XLA_FLAGS; JAX 0.12 has no such setting.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Some 600 MB in 80,000 files: a disk costs a sixth of the time. A kill leaves in memory what it
# would leave on a disk.
RAM_DISK = "/dev/shm"
if os.access(RAM_DISK, os.W_OK) and shutil.disk_usage(RAM_DISK).free > 8 * 10**9:
    # Python has looked it up before, and what a test starts looks it up anew.
    tempfile.tempdir = os.environ.setdefault("TMPDIR", RAM_DISK)

import filelock  # noqa: E402
import jax  # noqa: E402  (after what it reads at import)
import programs  # noqa: E402

from jaxlm.terminal import log_to  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests start the same small run over and over: compile it once. With a limit to its size, several
# processes can share the cache: JAX locks it.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_compilation_cache_max_size", 4 * 10**9)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write tests/golden/*.npz anew from transformers (needs torch)",
    )


def pytest_collection_finish() -> None:
    """Takes the modules out of the sight of the garbage collector, which looks at all of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


def _of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache; a child process inherits the setting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        compiled = _of_all_workers(tmp_path_factory) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        programs.share(patch)
        yield


@pytest.fixture(autouse=True)
def no_wandb_service() -> Iterator[None]:
    """A W&B service of an earlier test would take the runs of this test's child processes."""
    yield
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Log records of jaxlm, as lines; a run and a command print theirs instead."""
    found: list[str] = []
    with log_to(found.append):
        yield found


@pytest.fixture(scope="session")
def shared_home(cache_dir: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a finished run in it (see tests/text_run.py); only to be read."""
    import text_run

    home = _of_all_workers(tmp_path_factory) / "home"
    with filelock.FileLock(home.with_suffix(".lock")):
        if not home.exists():
            made = text_run.make_home(tmp_path_factory.mktemp("made") / "home")
            text_run.make_run(made)
            made.rename(home)
    before = sorted(home.rglob("*"))
    yield home
    # One file more, such as evals.jsonl, and tests that copy the run fail far from its writer.
    assert sorted(home.rglob("*")) == before, "a test wrote where it was only to read"


@pytest.fixture
def own_home(shared_home: Path, tmp_path: Path) -> Path:
    """A copy of that home, to be changed at will."""
    return shutil.copytree(shared_home, tmp_path / "home")
