"""What a run is: frozen dataclasses, one per component, each field with its unit and its rule.

Every field says what a resume may do with it:

- `free`: a new value is simply applied (logging, intervals, retention, mesh);
- `recorded`: a new value is applied, listed, and written to the run's lineage;
- `fixed`: a new value is refused, because the run would no longer be the same run.
"""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal, TypeVar

import tyro

from jaxlm.files.strict import conform

T = TypeVar("T")
Policy = Literal["free", "recorded", "fixed"]


def _field(default: T, policy: Policy) -> T:
    # Typed as the default itself, so that a type checker sees an ordinary dataclass field.
    return dataclasses.field(default=default, metadata={"resume": policy})


def free(default: T) -> T:
    """A field that a resume may change without a word."""
    return _field(default, "free")


def recorded(default: T) -> T:
    """A field that a resume may change, and that is then listed and kept in the lineage."""
    return _field(default, "recorded")


def fixed(default: T) -> T:
    """A field that a resume must not change."""
    return _field(default, "fixed")


# A config is shown and written to many places: none is for a URL with a password or a signed query.
_KEY_IN_URL = re.compile(r"(?<=://)([^/\s]*@|\S*\?)[^\s']*")


def _check(ok: bool, name: str, found: object, expected: str) -> None:
    if not ok:
        shown = _KEY_IN_URL.sub("…", repr(found))
        raise ValueError(f"{name}: found {shown}, expected {expected}")


def _check_at_least(config: Any, prefix: str, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _check(value >= minimum, prefix + name, value, f"at least {minimum}")


def _check_above_0(config: Any, prefix: str, expected: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _check(value > 0, prefix + name, value, expected)


def _check_divides(config: Any, prefix: str, name: str, whole: str) -> None:
    value, of = getattr(config, name), getattr(config, whole)
    _check(of % value == 0, prefix + name, value, f"a divisor of {whole} ({of})")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family."""

    vocab_size: int = fixed(8192)
    """Rows of the embedding (tokens); the tokenizer's vocabulary must fit in it."""
    num_layers: int = fixed(6)
    """Transformer blocks."""
    d_model: int = fixed(256)
    """Width of the residual stream."""
    d_ff: int = fixed(704)
    """Width of the SwiGLU hidden layer."""
    num_heads: int = fixed(4)
    """Query heads per layer."""
    num_kv_heads: int = fixed(4)
    """Key/value heads per layer; must divide num_heads."""
    head_dim: int = fixed(64)
    """Width of one head; even, for RoPE."""
    rope_theta: float = fixed(10_000.0)
    """Base of the RoPE wavelengths."""
    norm_eps: float = fixed(1e-5)
    """Epsilon inside RMSNorm."""
    qk_norm: bool = fixed(False)
    """RMSNorm on queries and keys, per head, as in Qwen3."""
    tie_embeddings: bool = fixed(False)
    """Use the embedding as the output head too."""
    document_mask: bool = fixed(False)
    """Attend only within a document (documents end at the tokenizer's EOS)."""
    init_std: float = fixed(0.02)
    """Standard deviation of the initial weights; outputs of a block and an own head are 0."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = recorded("auto")
    """Dtype of activations; auto is bfloat16 on TPU and GPU, float32 on CPU. Params are float32."""
    remat: Literal["none", "products", "full"] = free("none")
    """What of a block the backward pass finds in memory, and does not compute again: all, the
    results of its matrix products, or none but its input. Each needs less memory than the one
    before, and more time."""

    def __post_init__(self) -> None:
        _check_at_least(self, "model.", 1, "vocab_size", "num_layers", "d_model", "d_ff")
        _check_at_least(self, "model.", 1, "num_heads", "num_kv_heads", "head_dim")
        _check_divides(self, "model.", "num_kv_heads", "num_heads")
        _check(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number")
        _check_above_0(self, "model.", "a number above 0", "rope_theta", "norm_eps", "init_std")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text and its tokens."""

    source: str = fixed("embedded")
    """embedded, text:GLOB, tfds:NAME, tfds_dir:PATH or hf:REPO[:CONFIG]."""
    split: str = fixed("train")
    """Split to read, where the source has several (tfds, hf)."""
    text_field: str = fixed("text")
    """Field or column that holds the text (jsonl, parquet, tfds, hf)."""
    tokenizer: str = fixed("train")
    """train (a byte-level BPE on this corpus), or a tokenizer.json: its path, or its hub name."""
    eos_token: str | None = fixed(None)
    """The token that ends a document; found by its usual names if not given."""
    max_tokens: int | None = fixed(None)
    """Training tokens to prepare at most; by default what num_steps needs, and at least 10 M."""
    eval_tokens: int = fixed(2_000_000)
    """Held-out tokens to prepare at most; from documents that are never trained on."""
    cache_dir: str | None = free(None)
    """Where prepared tokens are kept; by default $JAXLM_CACHE, else ~/.cache/jaxlm."""
    prefetch: int = free(2)
    """Batches made ahead on a host thread."""

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        _check(
            self.source == "embedded"
            or (kind in ("text", "tfds", "tfds_dir", "hf") and rest != ""),
            "data.source",
            self.source,
            "embedded, text:GLOB, tfds:NAME, tfds_dir:PATH or hf:REPO[:CONFIG]",
        )
        _check(self.tokenizer != "", "data.tokenizer", self.tokenizer, "train, a path or a name")
        _check_at_least(self, "data.", 1, "max_tokens", "eval_tokens", "prefetch")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["muon", "adamw"] = fixed("muon")
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all."""
    learning_rate: float = recorded(1e-3)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = recorded("cosine")
    """After the warmup: cosine decay, warmup-stable-decay, or constant."""
    warmup_steps: int = recorded(100)
    """Linear warmup (steps)."""
    decay_fraction: float = recorded(0.2)
    """wsd: the last fraction of num_steps, in which the rate falls linearly."""
    min_lr_ratio: float = recorded(0.1)
    """Final learning rate as a fraction of the peak (cosine and wsd)."""
    weight_decay: float = recorded(0.1)
    """Decoupled weight decay, on matrices only, scaled by the learning rate."""
    beta1: float = recorded(0.9)
    """Decay of Adam's first moment."""
    beta2: float = recorded(0.95)
    """Decay of Adam's second moment."""
    eps: float = recorded(1e-8)
    """Adam's epsilon."""
    muon_beta: float = recorded(0.95)
    """Decay of Muon's momentum."""
    muon_rms: float = recorded(0.05)
    """Root mean square of Muon's updates, before the learning rate (Adam's are about 0.2)."""
    clip_norm: float | None = recorded(1.0)
    """Clip the gradient to this global norm; None does not clip."""
    ema_decay: float | None = recorded(None)
    """Decay of the moving average of the weights; where there is one, it is what evals and all use
    of the model take. A resume may begin it, with the weights as they are, or drop it."""

    def __post_init__(self) -> None:
        _check_above_0(self, "optim.", "above 0", "learning_rate", "eps", "muon_rms")
        _check_above_0(self, "optim.", "above 0, or None", "clip_norm")
        _check_at_least(self, "optim.", 0, "warmup_steps", "weight_decay")
        for name in ("beta1", "beta2", "muon_beta", "ema_decay"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < 1, f"optim.{name}", value, "in [0, 1)")
        for name in ("decay_fraction", "min_lr_ratio"):
            _check(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; at most one may be -1, which takes what is left."""

    data: int = free(-1)
    """Data parallel: batch split, params copied."""
    fsdp: int = free(1)
    """Fully sharded data parallel: batch and params split."""
    tensor: int = free(1)
    """Tensor parallel: heads, hidden layer and vocabulary split."""

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            _check(size == -1 or size >= 1, f"mesh.{name}", size, "at least 1, or -1")
        _check(sizes.count(-1) <= 1, "mesh", sizes, "at most one axis of -1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is saved, where, and for how long it is kept."""

    directory: Annotated[str | None, tyro.conf.arg(aliases=["--checkpoint-dir"])] = free(None)
    """Folder of the checkpoints; by default RUN_DIR/checkpoints."""
    save_interval: Annotated[int, tyro.conf.arg(aliases=["--save-interval"])] = free(500)
    """Save every so many steps, whatever the evals do (steps)."""
    save_interval_min: float | None = free(None)
    """Save also when this much time has passed since the last save (minutes)."""
    keep_latest: int = free(3)
    """Newest checkpoints to keep; the best is kept besides."""
    keep_every: int | None = free(None)
    """Keep for good each checkpoint whose step is a multiple of this (steps)."""
    keep_weights_every: int | None = free(None)
    """Of those that go, keep the weights alone if the step is a multiple of this (steps)."""
    on_save_error: Literal["stop", "warn"] = free("stop")
    """A save that failed stops the run, or is reported while training goes on (one process)."""
    save_timeout_s: int = free(300)
    """With several processes: how long a save may take until all stop with an error (seconds)."""
    verify: Literal["full", "fast", "off"] = free("full")
    """At restore: full checks every file and array, fast sizes and small files, off nothing."""
    disk_budget_gb: float | None = free(None)
    """Bytes that the checkpoints may take (10^9); milestones of `keep_every` are thinned to it."""
    on_low_disk: Literal["warn", "refuse"] = free("warn")
    """Before the first step, if the disk is smaller than the plan: warn, or do not begin."""
    lock: Literal["required", "if_possible"] = free("required")
    """Where the file system has no locks: do not begin, or warn and trust that no other does."""

    def __post_init__(self) -> None:
        _check_at_least(self, "checkpoint.", 1, "save_interval", "keep_latest", "keep_every")
        _check_at_least(self, "checkpoint.", 1, "keep_weights_every", "save_timeout_s")
        _check_above_0(
            self, "checkpoint.", "above 0, or None", "save_interval_min", "disk_budget_gb"
        )
        # Orbax would make a local folder of that name, or write where nothing can be locked.
        _check(
            "://" not in (self.directory or ""),
            "checkpoint.directory",
            self.directory,
            "a local path; mount an object store as a folder",
        )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is done when a loss goes bad."""

    max_nonfinite: int = recorded(10)
    """Steps in a row whose loss or gradient is not finite, after which `on_nonfinite` applies."""
    on_nonfinite: Literal["stop", "rollback"] = recorded("stop")
    """Stop the run; or go back to a checkpoint, and pass over the batches in between."""
    spike_zscore: float | None = recorded(None)
    """Roll back if the loss stays so many standard deviations above its median; by default not."""
    spike_steps: int = recorded(3)
    """Steps in a row above `spike_zscore` that make a spike."""
    max_rollbacks: int = recorded(3)
    """Rollbacks in the whole run, after which the next one stops it."""

    def __post_init__(self) -> None:
        _check_at_least(self, "guard.", 1, "max_nonfinite", "spike_steps")
        _check_at_least(self, "guard.", 0, "max_rollbacks")
        _check_above_0(self, "guard.", "above 0, or None", "spike_zscore")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["off", "online", "offline"] = free("off")
    """Weights & Biases."""
    wandb_project: str = free("jaxlm")
    """W&B project."""
    tensorboard: bool = free(False)
    """Write TensorBoard event files to RUN_DIR/tensorboard."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = fixed(ModelConfig())
    """The model."""
    data: DataConfig = fixed(DataConfig())
    """The data."""
    optim: OptimConfig = recorded(OptimConfig())
    """The optimizer."""
    mesh: MeshConfig = free(MeshConfig())
    """The devices."""
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    """The checkpoints."""
    guard: GuardConfig = recorded(GuardConfig())
    """The divergence guard."""
    tracking: TrackingConfig = free(TrackingConfig())
    """The trackers."""
    num_steps: int = recorded(1000)
    """Updates in the whole run (steps)."""
    batch_size: int = fixed(16)
    """Sequences per step, over all devices."""
    seq_len: int = fixed(256)
    """Tokens per sequence."""
    num_microbatches: int = recorded(1)
    """Gradient accumulation: a step takes its batch in this many parts, one after the other."""
    loss_chunks: int = free(1)
    """The logits are made for one part of the sequence at a time, of this many, and again in the
    backward pass: a large vocabulary then takes less memory, and the step a little longer."""
    z_loss: float = recorded(0.0)
    """Weight of the squared log-normalizer in the training loss (PaLM used 1e-4)."""
    deterministic: bool = recorded(True)
    """On a GPU: XLA takes only kernels that give the same bits each time, and the same ones at each
    start. Without it a resumed run differs by rounding. CPU and TPU give the same bits anyway."""
    seed: int = fixed(0)
    """Seed of the initial weights and of the data order."""
    eval_interval: int = free(500)
    """Evaluate every so many steps, and save if the best improved (steps)."""
    stop_after_worse_evals: int | None = free(None)
    """End the run after this many evals in a row without a new best; by default it goes on."""
    log_interval: int = free(10)
    """Print and log every so many steps (steps)."""
    profile: int = free(0)
    """Trace this many steps, from the sixth of this start on, to RUN_DIR/profile (steps)."""
    sample_prompt: str | None = free(None)
    """Once the plan is complete, print what the best model makes of this text; None prints none."""
    overfit_one_batch: bool = fixed(False)
    """Train on batch 0 forever: a first check that the model can learn."""
    branch_from: str | None = free(None)
    """Begin a new run with the full state of RUN@STEP (STEP: best, latest, final or a number)."""
    init_from: str | None = free(None)
    """Begin a new run, at step 0, with the weights alone of RUN@STEP."""
    run_dir: str = free("runs/default")
    """Folder of the run; launch.py names it runs/CONFIG by default."""
    resume: Literal["auto", "best", "never"] = free("auto")
    """Where there are checkpoints, `auto` goes on from the latest sound one, `best` goes back to
    the best, once, and `never` ends with an error: the run must be new."""

    def __post_init__(self) -> None:
        for name, (value, _) in leaves(self).items():
            if isinstance(value, float):
                _check(math.isfinite(value), name, value, "a finite number")
            if isinstance(value, str):
                _check(not _KEY_IN_URL.search(value), name, value, "a URL without a key in it")
        _check_at_least(self, "", 1, "num_steps", "batch_size", "seq_len", "num_microbatches")
        _check_at_least(self, "", 1, "loss_chunks")
        _check_at_least(self, "", 1, "eval_interval", "stop_after_worse_evals", "log_interval")
        _check_at_least(self, "", 0, "z_loss", "seed", "profile")
        _check(self.seed < 2**32, "seed", self.seed, "less than 2**32")
        _check(self.run_dir != "", "run_dir", self.run_dir, "a folder name")
        _check_divides(self, "", "num_microbatches", "batch_size")
        _check_divides(self, "", "loss_chunks", "seq_len")
        warmup = self.optim.warmup_steps
        _check(
            warmup < self.num_steps or self.num_steps == 1,
            "optim.warmup_steps",
            warmup,
            f"less than num_steps ({self.num_steps}); "
            f"add --optim.warmup_steps {self.num_steps // 10}",
        )
        _check(
            self.branch_from is None or self.init_from is None,
            "init_from",
            self.init_from,
            "nothing beside branch_from, which takes the whole state",
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return self.batch_size * self.seq_len

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a step, or an eval, takes at once."""
        return self.batch_size // self.num_microbatches

    @property
    def checkpoint_dir(self) -> str:
        """Folder of the checkpoints."""
        return self.checkpoint.directory or f"{self.run_dir}/checkpoints"

    @property
    def intervals_nest(self) -> bool:
        """Whether one of the save and eval intervals divides the other."""
        small, large = sorted((self.checkpoint.save_interval, self.eval_interval))
        return large % small == 0


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
      ValueError: an unknown field, or a value of another type or that its rule refuses.
    """
    return conform(values, Config)


@dataclasses.dataclass(frozen=True)
class Change:
    """A field that differs between two configs."""

    name: str
    old: Any
    new: Any
    policy: Policy

    def __str__(self) -> str:
        return f"{self.name}: was {self.old!r}, is {self.new!r}"


def leaves(config: Any, prefix: str = "") -> dict[str, tuple[Any, Policy]]:
    """Dotted name -> (value, policy) of every field that is not itself a config."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= leaves(value, name + ".")
        else:
            found[name] = (value, field.metadata["resume"])
    return found


def changes(old: Config, new: Config) -> list[Change]:
    """The fields that differ, with what a resume may do about each."""
    before, after = leaves(old), leaves(new)
    return [
        Change(name, before[name][0], value, policy)
        for name, (value, policy) in after.items()
        if value != before[name][0]
    ]
