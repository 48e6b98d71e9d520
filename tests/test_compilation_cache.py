"""Compiled programs are kept, and a kill while one is written costs one compilation at most."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache
from tiny_run import tiny_config

from jaxlm.compilation_cache import (
    _machine,
    clear_compiled,
    compiled_bytes,
    compiled_folder,
    enable_compilation_cache,
)
from jaxlm.config import OptimConfig
from jaxlm.plan.ahead import lower_ahead

PROGRAM = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
import test_compilation_cache
print(*test_compilation_cache.start(Path(sys.argv[1])))
"""

HIT = "Persistent compilation cache hit for 'jit__lambda'"
SETTINGS = [
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
]


def start(home: Path) -> tuple[str, float]:
    """What a new process does: returns its folder of programs, and the result of one of them."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    enable_compilation_cache(str(home))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    folder = str(jax.config.values["jax_compilation_cache_dir"])
    return folder, float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(3.0)))


def hit(log: pytest.LogCaptureFixture) -> bool:
    """Whether `start` has found its program in the cache, since the last call of this."""
    found = HIT in log.text
    log.clear()
    return found


@pytest.fixture(autouse=True)
def own_cache(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Afterwards JAX has the cache of the other tests again."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    with caplog.at_level(logging.DEBUG, "jax._src.compiler"):
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_second_start_finds_what_the_first_has_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first = start(tmp_path)
    assert not hit(caplog)
    assert start(tmp_path) == first and hit(caplog)
    command = [sys.executable, "-W", "always", "-c", PROGRAM, str(tmp_path)]
    tests = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tests)
    assert done.stdout.split() == [first[0], str(first[1])] and HIT in done.stderr
    assert Path(first[0]).parent == compiled_folder(str(tmp_path))

    assert compiled_bytes(str(tmp_path)) > 0
    clear_compiled(str(tmp_path))
    assert compiled_bytes(str(tmp_path)) == 0
    clear_compiled(str(tmp_path))
    assert start(tmp_path) == first and not hit(caplog)


def test_what_a_kill_cut_short_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder, value = start(tmp_path)
    (entry,) = Path(folder).glob("jit__lambda-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:100])
    stamp = entry.with_name(entry.name.replace("-cache", "-atime"))
    stamp.unlink()  # it is written last
    assert start(tmp_path) == (folder, value)  # without a warning
    assert not hit(caplog)
    start(tmp_path)
    assert hit(caplog)
    assert entry.stat().st_size == pytest.approx(len(whole), rel=0.01)


def test_a_damaged_program_is_compiled_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder, value = start(tmp_path)
    (entry,) = Path(folder).glob("jit__lambda-*-cache")
    entry.write_bytes(entry.read_bytes()[:100])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert start(tmp_path) == (folder, value)
    assert not hit(caplog)


@pytest.mark.parametrize(
    ("orders", "cache", "found"),
    [({"jax_compilation_cache_dir": "elsewhere"}, "cache", "elsewhere")]
    + [({"jax_enable_compilation_cache": False}, "cache", None)]
    + [({}, "/dev/null/cache", None)],
)
def test_what_the_user_says_to_jax_holds(
    tmp_path: Path, orders: dict[str, Any], cache: str, found: str | None
):
    """JAX makes these settings of the environment when it is imported."""
    for name, value in ({"jax_compilation_cache_dir": None} | orders).items():
        jax.config.update(name, value)
    enable_compilation_cache(str(tmp_path / cache))
    assert jax.config.values["jax_compilation_cache_dir"] == found
    assert not (tmp_path / "cache").exists()


def test_a_longer_plan_at_another_rate_needs_no_other_program():
    def program(num_steps: int = 12, **optim: Any) -> str:
        optim = {"name": "adamw", "warmup_steps": 2} | optim
        config = tiny_config("x", num_steps=num_steps, optim=OptimConfig(**optim))
        return lower_ahead(config, jax.devices())[0].as_text()

    assert program() == program(40, learning_rate=0.3, warmup_steps=5, min_lr_ratio=0.5)
    assert program() != program(weight_decay=0.3)


def test_other_flags_in_a_file_of_flags_are_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flags"
    monkeypatch.setenv("XLA_FLAGS", str(file))
    folders = set()
    for flag in ("--xla_cpu_max_isa=AVX", "--xla_cpu_max_isa=AVX2"):
        file.write_text(flag)
        folders.add(_machine())
    assert len(folders) == 2
