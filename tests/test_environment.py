"""What the bits of a run depend on besides: recorded, and named where a resume differs."""

import functools
import shutil
from pathlib import Path

import jax
import pytest
from flax import nnx
from tiny_model import ONE_DEVICE, mesh_of
from tiny_run import VOCAB, TinyBatches, tiny_config

from jaxlm.compilation_cache import num_cores
from jaxlm.config import MeshConfig
from jaxlm.training import environment
from jaxlm.training.environment import compare_environments, describe_environment
from jaxlm.training.train import train

WARNING = "bits may differ from an uninterrupted run: "
describe = functools.partial(describe_environment, mesh_of(*ONE_DEVICE))


def differences(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    """What a change of environment variables makes other."""
    before = describe()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return compare_environments(before, describe())


def test_without_settings_none_is_recorded(monkeypatch: pytest.MonkeyPatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    of_tests = {"jax_disable_most_optimizations"}  # conftest.py turns it on
    known = {"versions", "device_kind", "processor", "mesh", "processes", "cores"}
    assert describe().keys() - of_tests == known


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ("", "--xla_cpu_max_isa=AVX2", ["XLA_FLAGS: was not set, is --xla_cpu_max_isa=AVX2"]),
        ("--xla_a=1 --xla_b=2", " --xla_b=2\n--xla_a=3 --xla_a=1", []),
        ("--xla_a=1", "--xla_a=1 --xla_a=3", ["XLA_FLAGS: was --xla_a=1, is --xla_a=3"]),
        (
            "--xla_a=1",
            "--xla_dump_to=/tmp/x --xla_a=1 --xla_force_host_platform_device_count=8",
            [],
        ),
    ],
)
def test_flags_of_xla(monkeypatch: pytest.MonkeyPatch, before: str, after: str, lines: list[str]):
    monkeypatch.setenv("XLA_FLAGS", before)
    assert differences(monkeypatch, XLA_FLAGS=after) == lines


def test_flags_of_libtpu_and_cores_of_xla(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NPROC", "3")
    assert num_cores() == 3
    flags = "--xla_tpu_enable_x=true"
    assert differences(monkeypatch, NPROC="5", LIBTPU_INIT_ARGS=flags) == [
        f"LIBTPU_INIT_ARGS: was not set, is {flags}",
        "cores: was 3, is 5",
    ]


def test_flags_in_a_file_are_those_of_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path):
    # XLA takes a value that is no flag as the name of a file.
    file = tmp_path / "flags"
    file.write_text("--xla_cpu_max_isa=SSE4_2 --xla_dump_to=x\n")
    (found,) = differences(monkeypatch, XLA_FLAGS=str(file))
    assert found.startswith("XLA_FLAGS: was ") and found.endswith("is --xla_cpu_max_isa=SSE4_2")
    (found,) = differences(monkeypatch, XLA_FLAGS=str(tmp_path / "none"))
    assert "which cannot be read" in found


def test_settings_of_jax():
    before = describe()
    with jax.default_matmul_precision("float32"), jax.numpy_dtype_promotion("strict"):
        found = compare_environments(before, describe())
    assert found == [
        "jax_default_matmul_precision: was not set, is float32",
        "jax_numpy_dtype_promotion: was not set, is strict",
    ]
    of_older_jax = {
        "jax_disable_most_optimizations",
        "jax_exec_time_optimization_effort",
        "jax_memory_fitting_effort",
    }
    assert environment._JAX_DEFAULTS.keys() - jax.config.values.keys() <= of_older_jax


def test_the_processor_is_known_by_its_vector_instructions(monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for flags in ("fpu sse2 fma avx avx2 smep", "sse2 avx2 avx avx512f amx_tile fma"):
        info = f"model name: X\nflags: {flags}"
        monkeypatch.setattr(environment, "cpu_info", lambda info=info: info)
        told.append(describe())
    assert compare_environments(*told) == [
        "processor: was x86_64 avx avx2 fma, is x86_64 amx_tile avx avx2 avx512f fma"
    ]


class Table(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, VOCAB)))

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self.table[...][tokens]


def test_a_resume_names_each_difference_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = tiny_config(tmp_path, num_steps=3, checkpoint={"save_interval": 1}, mesh=MeshConfig())

    def resume() -> list[str]:
        shutil.rmtree(tmp_path / "checkpoints" / "3", ignore_errors=True)
        capsys.readouterr()
        assert train(config, model=Table, batches=TinyBatches()).complete
        said = "".join(capsys.readouterr()).splitlines()
        return [line.partition(WARNING)[2] for line in said if WARNING in line]

    monkeypatch.setenv("XLA_FLAGS", "")
    assert resume() == resume() == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert resume() == ["XLA_FLAGS: was not set, is --xla_cpu_max_isa=AVX2"]
