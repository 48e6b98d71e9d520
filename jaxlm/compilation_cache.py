"""The cache of compiled programs, which spares the next start the compilation."""

import os
import platform
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import filelock
import jax

from jaxlm.files.cache import cache_root

PROGRAMS = "programs"
"""The word for all compiled programs in `jaxlm cache list` and `jaxlm cache clear`."""
MAX_BYTES = 4 * 10**9
_LOCK = ".lockfile"  # JAX's own
_MIN_COMPILE_S = 0.2


def enable_compilation_cache(cache_dir: str | None) -> None:
    """Turns on JAX's persistent cache, in a folder for machines like this one.

    Does nothing if the environment configures the cache (`JAX_COMPILATION_CACHE_DIR`, or
    `JAX_ENABLE_COMPILATION_CACHE=false`), or if the folder is not writable.
    """
    settings: dict[str, Any] = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = compiled_folder(cache_dir) / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
    except (OSError, ValueError):  # a run without the cache only compiles again
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_S)


def compiled_folder(cache_dir: str | None) -> Path:
    """The folder of compiled programs, with a subfolder for each kind of machine."""
    return cache_root(cache_dir) / "compiled"


def compiled_bytes(cache_dir: str | None) -> int:
    """The size of all compiled programs on disk (bytes)."""
    return sum(path.stat().st_size for path in compiled_folder(cache_dir).rglob("*-cache"))


def clear_compiled(cache_dir: str | None) -> None:
    """Deletes all compiled programs."""
    if (folder := compiled_folder(cache_dir)).exists():
        shutil.rmtree(folder)


def num_cores() -> int | None:
    """The number of cores that XLA assumes: `NPROC`, else the cores available to this process."""
    if (nproc := os.environ.get("NPROC", "")).isdigit():
        return int(nproc)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def cpu_info() -> str:
    """Model and features of the processor, as the system reports them."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in info.splitlines() if line.startswith(wanted)}))


def xla_flags() -> str:
    """`XLA_FLAGS`, or the content of the file that it names."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags or flags.startswith("-"):
        return flags
    try:
        return Path(flags).read_text().strip()
    except (OSError, UnicodeError) as error:
        return f"{flags}, which cannot be read ({error})"


def _machine() -> str:
    # A hash of what JAX's cache key lacks: CPU, cores, content of a file of XLA flags. A program
    # compiled for another CPU may crash; one for another number of cores may give other bits.
    kind = "\n".join([platform.machine(), str(num_cores()), cpu_info(), xla_flags()])
    return sha256(kind.encode()).hexdigest()[:12]


def _remove_partial(folder: Path) -> None:
    # JAX writes an entry, then its time stamp. A kill in between leaves an entry without a stamp,
    # perhaps cut short: JAX never replaces it, and JAX 0.10 then fails to write any other.
    with filelock.FileLock(folder / _LOCK, timeout=10):
        for path in folder.glob("*-cache"):
            if not path.with_name(path.name.removesuffix("-cache") + "-atime").exists():
                path.unlink()
