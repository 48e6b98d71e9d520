import ast
import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config as config_module
from jaxlm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TasksConfig,
    TrackingConfig,
    changes,
    fixed,
    from_dict,
    leaves,
    to_dict,
)
from jaxlm.files.strict import parse_json

PARTS = [
    ModelConfig,
    DataConfig,
    OptimConfig,
    MeshConfig,
    CheckpointConfig,
    GuardConfig,
    TasksConfig,
    TrackingConfig,
    Config,
]
POLICIES = {"free", "recorded", "fixed"}


def undeclared(cls: type) -> list[str]:
    """Fields that do not say what a resume may do with them."""
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.metadata.get("resume") not in POLICIES]


def undescribed(source: str) -> list[str]:
    """Fields of the dataclasses in `source` that no docstring follows."""
    found = []
    for cls in ast.parse(source).body:
        if not isinstance(cls, ast.ClassDef) or not cls.name.endswith("Config"):
            continue
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not described:
                    found.append(f"{cls.name}.{ast.unparse(node.target)}")
    return found


def test_every_config_class_is_looked_at():
    found = {
        value
        for name, value in vars(config_module).items()
        if inspect.isclass(value) and name.endswith("Config")
    }
    assert found == set(PARTS)


@pytest.mark.parametrize("cls", PARTS)
def test_every_field_declares_what_a_resume_may_do(cls):
    assert dataclasses.fields(cls)
    assert undeclared(cls) == []


def test_a_field_that_declares_nothing_is_found():
    @dataclasses.dataclass(frozen=True)
    class Careless:
        a: int = fixed(1)
        b: int = 2

    assert undeclared(Careless) == ["b"]


def test_every_field_has_a_docstring():
    source = inspect.getsource(config_module)
    assert undescribed(source) == []
    without = re.sub(r'\n    """Transformer blocks.*?"""', "", source)
    assert undescribed(without) == ["ModelConfig.num_layers"]


@pytest.mark.parametrize("cls", PARTS)
def test_configs_are_frozen(cls):
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), name, 1)


INVALID = [
    (ModelConfig, "model.vocab_size", 0),
    (ModelConfig, "model.num_layers", 0),
    (ModelConfig, "model.d_model", 0),
    (ModelConfig, "model.d_ff", 0),
    (ModelConfig, "model.num_heads", 0),
    (ModelConfig, "model.num_kv_heads", 0),
    (ModelConfig, "model.num_kv_heads", 3),
    (ModelConfig, "model.head_dim", 0),
    (ModelConfig, "model.head_dim", 7),
    (ModelConfig, "model.rope_theta", 0.0),
    (ModelConfig, "model.norm_eps", -1e-6),
    (ModelConfig, "model.init_std", 0.0),
    (DataConfig, "data.source", "gopher:x"),
    (DataConfig, "data.source", "text:"),
    (DataConfig, "data.tokenizer", ""),
    (DataConfig, "data.max_tokens", 0),
    (DataConfig, "data.eval_tokens", 0),
    (DataConfig, "data.prefetch", 0),
    (TasksConfig, "tasks.interval", 0),
    (TasksConfig, "tasks.limit", 0),
    (OptimConfig, "optim.learning_rate", 0.0),
    (OptimConfig, "optim.warmup_steps", -1),
    (OptimConfig, "optim.weight_decay", -0.1),
    (OptimConfig, "optim.beta1", 1.0),
    (OptimConfig, "optim.beta2", -0.1),
    (OptimConfig, "optim.decay_fraction", 1.1),
    (OptimConfig, "optim.min_lr_ratio", -0.1),
    (OptimConfig, "optim.eps", 0.0),
    (OptimConfig, "optim.clip_norm", 0.0),
    (MeshConfig, "mesh.data", 0),
    (MeshConfig, "mesh.fsdp", -2),
    (MeshConfig, "mesh.tensor", 0),
    (CheckpointConfig, "checkpoint.save_interval", 0),
    (CheckpointConfig, "checkpoint.save_interval_min", 0.0),
    (CheckpointConfig, "checkpoint.keep_latest", 0),
    (CheckpointConfig, "checkpoint.keep_every", 0),
    (CheckpointConfig, "checkpoint.directory", "s3://bucket/run"),
    (Config, "num_steps", 0),
    (Config, "batch_size", 0),
    (Config, "seq_len", 0),
    (Config, "num_microbatches", 0),
    (Config, "num_microbatches", 3),
    (Config, "loss_chunks", 0),
    (Config, "loss_chunks", 5),
    (Config, "z_loss", -1e-4),
    (Config, "seed", -1),
    (Config, "seed", 2**32),
    (Config, "eval_interval", 0),
    (Config, "stop_after_worse_evals", 0),
    (Config, "log_interval", 0),
    (Config, "run_dir", ""),
]


@pytest.mark.parametrize(("cls", "name", "value"), INVALID, ids=lambda x: str(x))
def test_an_invalid_value_is_refused_by_name(cls, name, value):
    cls()  # the defaults are valid, so it is the value that is refused
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: found {re.escape(repr(value))}, "):
        cls(**{name.split(".")[-1]: value})


WRONG = [
    (OptimConfig, "optim.warmup_steps", 0.25 * 4, "expected int"),
    (OptimConfig, "optim.name", "adam", "expected 'muon' or 'adamw'"),
    (OptimConfig, "optim.schedule", "linear", "expected 'cosine' or 'wsd' or 'constant'"),
    (OptimConfig, "optim.learning_rate", "3e-4", "expected float"),
    (OptimConfig, "optim.learning_rate", "NaN", "expected a finite number"),
    (OptimConfig, "optim.learning_rate", 10**30, "expected an integer of 64 bits"),
    (ModelConfig, "model.qk_norm", 1, "expected bool"),
    (ModelConfig, "model.num_layers", True, "expected int"),
    (ModelConfig, "model.vocab_size", 2**31, "expected at least 1 and at most 2147483647"),
    (CheckpointConfig, "checkpoint.keep_latest", 2.0, "expected int"),
    (
        CheckpointConfig,
        "checkpoint.save_timeout_s",
        10**12,
        "expected at least 1 and at most 86400",
    ),
    (Config, "eval_interval", 10**19, "expected an integer of 64 bits"),
    (Config, "num_steps", 2**31, "expected at least 1 and at most 2147483647"),
    (Config, "run_dir", Path("runs/x"), "expected str"),
    (Config, "run_dir", "gs://bucket/run", "expected a local path"),
    (Config, "run_dir", os.fsdecode("caf\u00e9".encode("latin-1")), "expected text in UTF-8"),
    (Config, "sample_prompt", "a\0", "expected text in UTF-8, without NUL"),
    (Config, "model", {"num_layers": 2}, "expected a ModelConfig"),
    (Config, "model", OptimConfig(), "expected a ModelConfig"),
    (Config, "data", None, "expected a DataConfig"),
]


@pytest.mark.parametrize(("cls", "name", "value", "expected"), WRONG, ids=lambda x: str(x)[:40])
def test_a_value_of_the_wrong_kind_is_refused_when_a_config_is_made(cls, name, value, expected):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: found .*{re.escape(expected)}"):
        cls(**{name.split(".")[-1]: value})


def test_what_is_too_long_to_be_kept_is_refused():
    with pytest.raises(ValueError, match="^run_dir: found a name of 256 bytes .*255 at most"):
        Config(run_dir=f"runs/{'é' * 128}/x")
    with pytest.raises(ValueError, match="^sample_prompt: found 70,000 bytes, expected 65,536"):
        Config(sample_prompt="x" * 70_000)
    assert Config(run_dir="r" * 255, sample_prompt="x" * 65_536)


def test_a_wrong_name_gets_the_nearest_one():
    with pytest.raises(ValueError, match="^num_step: not a field of Config; .* num_steps?"):
        Config(num_step=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="^learning_rate: .* did you mean optim.learning_rate?"):
        Config(learning_rate=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="^optim.lr: not a field of OptimConfig; its fields are n"):
        dataclasses.replace(OptimConfig(), lr=3)  # pyright: ignore[reportCallIssue]


def test_the_home_folder_stands_for_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = Config(run_dir="~/runs/a", checkpoint=CheckpointConfig(directory="~/kept"))
    assert config.run_dir == "/home/me/runs/a" and config.checkpoint_dir == "/home/me/kept"
    assert DataConfig(cache_dir="~/c").cache_dir == "/home/me/c"
    assert Config(run_dir="runs/~").run_dir == "runs/~"


NUMBERS = st.integers() | st.integers(0, 64) | st.floats() | st.floats(0, 1)
VALUES = st.none() | st.booleans() | NUMBERS | st.text() | st.binary().map(os.fsdecode)
PART_OF = {cls: field.name for field in dataclasses.fields(Config) for cls in [type(field.default)]}
NAMES = (*leaves(Config()), *PART_OF.values())


def changes_of(cls: type, name: str) -> st.SearchStrategy[tuple[type, str, object]]:
    words = get_args(get_type_hints(cls)[name])
    values = VALUES | st.sampled_from(words) if words else VALUES
    return st.tuples(st.just(cls), st.just(name), values)


FIELDS = [(cls, field.name) for cls in PARTS for field in dataclasses.fields(cls)]
CHANGES = st.lists(st.sampled_from(FIELDS).flatmap(lambda field: changes_of(*field)), max_size=6)


def test_whatever_a_config_accepts_comes_back_from_disk():
    accepted = []

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(CHANGES)
    def comes_back(wanted: list[tuple[type, str, object]]) -> None:
        config = Config()
        for cls, name, value in wanted:
            try:
                if cls is Config:
                    config = dataclasses.replace(config, **{name: value})
                else:
                    part = dataclasses.replace(getattr(config, PART_OF[cls]), **{name: value})
                    config = dataclasses.replace(config, **{PART_OF[cls]: part})
            except ValueError as error:
                assert str(error).startswith(NAMES), error
        text = json.dumps(to_dict(config))
        again = parse_json(text.encode(), Config)
        assert again == from_dict(json.loads(text)) == config
        assert json.dumps(to_dict(again)) == text
        accepted.append(config)

    comes_back()
    assert sum(config != Config() for config in accepted) > 12


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "eps", "beta1", "clip_norm"])
def test_nan_is_no_valid_number(field):
    with pytest.raises(ValueError, match=f"optim.{field}: found nan"):
        OptimConfig(**{field: float("nan")})


def test_combinations_are_checked():
    with pytest.raises(ValueError, match=r"^optim.warmup_steps: found 100, .*num_steps \(100\)"):
        Config(num_steps=100)
    Config(num_steps=101)
    Config(num_steps=1)  # a first try of one step needs no other flag
    with pytest.raises(ValueError, match="^mesh: .*at most one"):
        MeshConfig(data=-1, fsdp=-1)


def test_a_config_survives_json():
    config = Config(
        model=ModelConfig(num_layers=3, qk_norm=True),
        optim=OptimConfig(learning_rate=0.1 + 0.2, clip_norm=None),
        mesh=MeshConfig(data=2, fsdp=-1),
        num_steps=321,
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(to_dict(config)) != Config()


def test_what_another_version_wrote_is_named():
    values = to_dict(Config())
    values["model"]["num_experts"] = 8
    with pytest.raises(ValueError, match="^model.num_experts: not a field of this version"):
        from_dict(values)
    values = to_dict(Config())
    values["optim"]["beta1"] = 1.5
    with pytest.raises(ValueError, match=r"^optim.beta1: found 1.5"):
        from_dict(values)


def test_changes_are_listed_with_their_policies():
    old = Config()
    new = dataclasses.replace(
        old,
        model=ModelConfig(num_layers=7),
        optim=OptimConfig(learning_rate=0.5),
        log_interval=3,
    )
    assert changes(old, old) == []
    assert {(c.name, c.policy) for c in changes(old, new)} == {
        ("model.num_layers", "fixed"),
        ("optim.learning_rate", "recorded"),
        ("log_interval", "free"),
    }
    assert str(changes(old, new)[0]) == "model.num_layers: was 6, is 7"


def test_every_leaf_takes_part_in_changes():
    config = Config()
    count = sum(len(dataclasses.fields(cls)) for cls in PARTS) - (len(PARTS) - 1)
    assert len(leaves(config)) == count > 50


def test_what_decides_the_weights_and_the_data_is_fixed():
    policies = {name: policy for name, (_, policy) in leaves(Config()).items()}
    for name in (
        "model.d_model",
        "data.text_field",
        "data.tokenizer",
        "batch_size",
        "seq_len",
        "seed",
    ):
        assert policies[name] == "fixed", name
    # The tokens are compared by their fingerprint: their source may move.
    for name in ("optim.learning_rate", "optim.schedule", "data.source", "num_steps"):
        assert policies[name] == "recorded", name
    for name in ("log_interval", "checkpoint.keep_latest", "mesh.fsdp", "eval_interval"):
        assert policies[name] == "free", name


def test_derived_values():
    config = Config(batch_size=6, seq_len=7, run_dir="somewhere")
    assert config.tokens_per_step == 42
    assert config.checkpoint_dir == "somewhere/checkpoints"
    elsewhere = CheckpointConfig(directory="elsewhere")
    assert dataclasses.replace(config, checkpoint=elsewhere).checkpoint_dir == "elsewhere"


@pytest.mark.parametrize(
    ("save", "evals", "nest"), [(500, 500, True), (100, 500, True), (500, 100, True), (4, 6, False)]
)
def test_intervals_nest(save, evals, nest):
    config = Config(checkpoint=CheckpointConfig(save_interval=save), eval_interval=evals)
    assert config.intervals_nest is nest


def test_a_whole_number_in_a_field_of_floats_is_one_of_them():
    config = OptimConfig(learning_rate=1, clip_norm=2)
    assert [type(value) for value in (config.learning_rate, config.clip_norm)] == [float, float]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: OptimConfig(warmup_steps=10**18), "optim.warmup_steps"),
        (lambda: CheckpointConfig(disk_budget_gb=1e308), "checkpoint.disk_budget_gb"),
        (lambda: Config(run_dir="/".join(["a"] * 3000)), "run_dir: found a path of 5999 bytes"),
    ],
)
def test_what_no_run_could_take_is_refused(make, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        make()
