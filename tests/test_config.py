import ast
import dataclasses
import inspect
import json
import re

import pytest

from jaxlm import config as config_module
from jaxlm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    changes,
    fixed,
    from_dict,
    leaves,
    to_dict,
)

PARTS = [
    ModelConfig,
    DataConfig,
    OptimConfig,
    MeshConfig,
    CheckpointConfig,
    GuardConfig,
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
    for name in ("model.d_model", "data.source", "data.tokenizer", "batch_size", "seq_len", "seed"):
        assert policies[name] == "fixed", name
    for name in ("optim.learning_rate", "optim.schedule", "optim.weight_decay", "num_steps"):
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
