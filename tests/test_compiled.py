"""Compiled programs are kept, and a kill while one is written costs one compilation at most."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import tiny_config

from jaxlm.compiled import clear_compiled, compiled_bytes, compiled_folder
from jaxlm.config import OptimConfig
from jaxlm.plan.ahead import lower_ahead

PROGRAM = """
import logging, jax, jax.numpy as jnp
from jaxlm.compiled import keep_compiled
logging.basicConfig(level=logging.DEBUG)
keep_compiled(None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.config.jax_compilation_cache_dir)
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(3.0))))
"""


def start(home: Path, **env: str) -> tuple[list[str], str]:
    """Lines of the output, and what JAX logged."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "NPROC")
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"JAXLM_CACHE": str(home)} | env
    command = [sys.executable, "-W", "always", "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr


def hit(log: str) -> bool:
    return "Persistent compilation cache hit for 'jit__lambda'" in log


def test_the_second_start_finds_what_the_first_has_compiled(tmp_path: Path):
    (folder, first), log = start(tmp_path)
    assert not hit(log)
    (again, second), log = start(tmp_path)
    assert hit(log)
    assert (folder, first) == (again, second)
    assert Path(folder).parent == compiled_folder(str(tmp_path))

    assert compiled_bytes(str(tmp_path)) > 0
    clear_compiled(str(tmp_path))
    assert compiled_bytes(str(tmp_path)) == 0
    clear_compiled(str(tmp_path))
    assert not hit(start(tmp_path)[1])


def test_what_a_kill_cut_short_is_made_again(tmp_path: Path):
    (folder, value), _ = start(tmp_path)
    (entry,) = Path(folder).glob("jit__lambda-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:100])
    stamp = entry.with_name(entry.name.replace("-cache", "-atime"))
    stamp.unlink()  # it is written last
    lines, log = start(tmp_path)
    assert lines[1] == value
    assert not hit(log) and "Error" not in log
    assert hit(start(tmp_path)[1])
    assert entry.stat().st_size == pytest.approx(len(whole), rel=0.01)


def test_a_damaged_program_is_compiled_anew(tmp_path: Path):
    (folder, value), _ = start(tmp_path)
    (entry,) = Path(folder).glob("jit__lambda-*-cache")
    entry.write_bytes(entry.read_bytes()[:100])
    lines, log = start(tmp_path)
    assert lines[1] == value
    assert not hit(log) and "Error reading persistent compilation cache entry" in log


@pytest.mark.parametrize(
    ("env", "found"),
    [({"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, "elsewhere")]
    + [({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None")]
    + [({"JAXLM_CACHE": "/dev/null/cache"}, "None")],
)
def test_what_the_user_says_to_jax_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: str
):
    monkeypatch.chdir(tmp_path)
    assert start(tmp_path / "cache", **env)[0][0] == found
    assert not (tmp_path / "cache").exists()


def test_a_longer_plan_at_another_rate_needs_no_other_program():
    def program(num_steps: int = 12, **optim: Any) -> str:
        optim = {"warmup_steps": 2} | optim
        config = tiny_config("x", num_steps=num_steps, optim=OptimConfig(**optim))
        return lower_ahead(config, jax.devices())[0].as_text()

    assert program() == program(40, learning_rate=0.3, warmup_steps=5, min_lr_ratio=0.5)
    assert program() != program(weight_decay=0.3)
