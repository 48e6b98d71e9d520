"""The settings of a run: frozen dataclasses, one per component, each field with unit and rule.

Every field has a policy for a resume:

- `free`: a new value is simply applied (logging, intervals, retention, mesh);
- `recorded`: a new value is applied, listed, and written to the run's lineage;
- `fixed`: a new value is refused, because the run would no longer be the same run.
"""

import dataclasses
import math
import re
from difflib import get_close_matches
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, cast

import tyro

from jaxlm.errors import InputError
from jaxlm.files.durable import expand
from jaxlm.files.strict import hints_of, validate

T = TypeVar("T")
Policy = Literal["free", "recorded", "fixed"]


class Bounds(NamedTuple):
    """Bounds of a number; a field that may be None is not checked when None."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def hold(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        words = {"at least": self.least, "above": self.above, "below": self.below}
        words["at most"] = self.most
        return " and ".join(f"{word} {x}" for word, x in words.items() if math.isfinite(x))


def _field(default: T, policy: Policy, bounds: Bounds, *, is_folder: bool = False) -> T:
    # Typed as the default itself, so that a type checker sees an ordinary dataclass field.
    metadata = {"resume": policy, "is_folder": is_folder, "bounds": bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=cast(Any, default.copy), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def free(default: T, **bounds: float) -> T:
    """A field that a resume may change silently; the bounds are those of `Bounds`."""
    return _field(default, "free", Bounds(**bounds))


def folder(default: T) -> T:
    """A free field that names a folder of this machine; `~` becomes the home folder."""
    return _field(default, "free", Bounds(), is_folder=True)


def recorded(default: T, **bounds: float) -> T:
    """A field that a resume may change; the change is listed and kept in the lineage."""
    return _field(default, "recorded", Bounds(**bounds))


def fixed(default: T, **bounds: float) -> T:
    """A field that a resume must not change."""
    return _field(default, "fixed", Bounds(**bounds))


def _pairs(kind: type[str] | type[float]) -> Any:
    # A flag with names and values, which replaces the whole dict: tyro would make a flag of each
    # name that the default has, and take no other name.
    def parse(words: list[str]) -> dict[str, Any]:
        if len(words) % 2 or len({*words[::2]}) * 2 != len(words):
            raise ValueError(f"found {' '.join(words)}, expected NAME VALUE pairs, each name once")
        return dict(zip(words[::2], map(kind, words[1::2]), strict=True))

    def is_instance(value: object) -> bool:
        return isinstance(value, dict) and all(isinstance(x, kind | int) for x in value.values())

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME VALUE ...",
        instance_from_str=parse,
        is_instance=is_instance,
        str_from_instance=lambda value: [str(x) for item in value.items() for x in item],
    )


# A config is printed and stored in many places: refuse URLs with a password or a signed query.
_KEY_IN_URL = re.compile(
    r"(?<=://)(?:[^/\s]*@|[^\s?]*\?(?:\S*&)?[\w.-]*"
    r"(?:key|key_?id|access_?id|token|sig|signature|secret|passw(?:or)?d|pwd|credentials?|auth)"
    r"=[^\s&'])[^\s']*",
    re.IGNORECASE,
)
_MAX_SIZE = 2**31 - 1
"""Limit of dims and of the step counter, which are int32 on the device."""
_MAX_DISK_GB = 10**9
_MAX_TEXT_BYTES = 1 << 16
"""Limit of a string: the metadata of a checkpoint, which holds the config, is bounded."""
_MAX_TIMEOUT_S = 86_400
_MAX_CYCLE = 2**16
"""Limit of the sum of integer shares: a table of this many rows is made at each start."""
_KINDS = ("text", "tokens", "tfds", "tfds_dir", "hf")
_SOURCES = (
    "embedded, text:GLOB (text:s3://… too), tokens:GLOB, tfds:NAME, tfds_dir:PATH or "
    "hf:REPO[:CONFIG]"
)
MAX_EVAL_TOKENS = 2_000_000
MAIN = "main"
"""Name of the only source of a run."""


def _check(ok: bool, name: str, found: object, expected: str) -> None:
    if not ok:
        shown = _KEY_IN_URL.sub("…", repr(found))
        raise InputError(f"{name}: found {shown}, expected {expected}")


class _Part:
    """Base of a config or a part of one: checks field names, types and bounds.

    A value that does not survive JSON would train a run that cannot be resumed. So the reader of
    checkpoints checks every type when a config is made.
    """

    _prefix: ClassVar[str]

    def __init_subclass__(cls, *, prefix: str = "") -> None:
        cls._prefix = prefix

    def __new__(cls, *_: Any, **values: Any) -> Self:
        """Refuses an unknown field name, and proposes the nearest ones."""
        for name in values.keys() - cls.__annotations__.keys():
            raise InputError(
                f"{cls._prefix}{name}: not a field of {cls.__name__}; "
                + (_nearest(name) or f"its fields are {', '.join(cls.__annotations__)}")
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks types and bounds; subclasses add rules over several fields."""
        hints = hints_of(type(self))
        for field in dataclasses.fields(cast(Any, self)):
            name, value = self._prefix + field.name, getattr(self, field.name)
            for text in _texts(value):
                _check_text(name, text)
            if isinstance(field.default, _Part):
                part = type(field.default)
                _check(type(value) is part, name, value, f"a {part.__name__}")
            elif isinstance(number := validate(value, hints[field.name], name), float):
                _check(math.isfinite(number), name, value, "a finite number")
            elif type(value) is int and hints[field.name] in (float, float | None):
                # JAX takes no int of 64 bits as a float32.
                object.__setattr__(self, field.name, float(value))
            bounds: Bounds = field.metadata["bounds"]
            if isinstance(value, int | float) and not bounds.hold(value):
                optional = "" if hints[field.name] in (int, float) else ", or None"
                _check(False, name, value, f"{bounds}{optional}")
            if field.metadata["is_folder"] and isinstance(value, str):
                # Orbax would make a local folder of a URL, or write where nothing can be locked.
                local = "a local path; mount an object store as a folder"
                _check("://" not in value, name, value, local)
                _check(value != "", name, value, "the name of a folder")
                object.__setattr__(self, field.name, expand(value, name))

    def _check(self, ok: bool, name: str, expected: str) -> None:
        _check(ok, self._prefix + name, getattr(self, name), expected)

    def _check_divides(self, name: str, whole: str) -> None:
        value, of = getattr(self, name), getattr(self, whole)
        self._check(of % value == 0, name, f"a divisor of {whole} ({of})")


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for text in item if isinstance(text, str)]
    return [value] if isinstance(value, str) else []


def _check_text(name: str, value: str) -> None:
    _check(not _KEY_IN_URL.search(value), name, value, "a URL without a key in it")
    # Half of a pair stands for a byte that is not UTF-8, and could not be written to JSON.
    ok = not re.search("[\0\ud800-\udfff]", value)
    _check(ok, name, value, "text in UTF-8, without NUL")
    num_bytes = len(value.encode())
    if num_bytes > _MAX_TEXT_BYTES:
        raise InputError(f"{name}: found {num_bytes:,} bytes, expected {_MAX_TEXT_BYTES:,} at most")


def _nearest(name: str) -> str:
    # Of all parts: `learning_rate` in `Config` is one of `optim`.
    known = {full.rpartition(".")[2]: full for full in leaves(Config())}
    return "".join(f"did you mean {known[near]}?" for near in get_close_matches(name, known, n=1))


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Part, prefix="model."):
    """A decoder of the Llama family."""

    vocab_size: int = fixed(8192, least=1, most=_MAX_SIZE)
    """Rows of the embedding (tokens); the tokenizer's vocabulary must fit in it."""
    num_layers: int = fixed(6, least=1, most=_MAX_SIZE)
    """Transformer blocks."""
    d_model: int = fixed(256, least=1, most=_MAX_SIZE)
    """Width of the residual stream."""
    d_ff: int = fixed(704, least=1, most=_MAX_SIZE)
    """Width of the SwiGLU hidden layer."""
    num_heads: int = fixed(4, least=1, most=_MAX_SIZE)
    """Query heads per layer."""
    num_kv_heads: int = fixed(4, least=1, most=_MAX_SIZE)
    """Key/value heads per layer; must divide num_heads."""
    head_dim: int = fixed(64, least=1, most=_MAX_SIZE)
    """Width of one head; even, for RoPE."""
    rope_theta: float = fixed(10_000.0, above=0)
    """Base of the RoPE wavelengths."""
    norm_eps: float = fixed(1e-5, above=0)
    """Epsilon inside RMSNorm."""
    qk_norm: bool = fixed(False)
    """RMSNorm on queries and keys, per head, as in Qwen3."""
    tie_embeddings: bool = fixed(False)
    """Use the embedding as the output head too."""
    document_mask: bool = fixed(False)
    """Attend only within a document (documents end at the tokenizer's EOS)."""
    init_std: float = fixed(0.02, above=0)
    """Standard deviation of initial weights; output projections and an untied head start at 0."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = recorded("auto")
    """Dtype of activations; auto is bfloat16 on TPU and GPU, float32 on CPU. Params are float32."""
    remat: Literal["none", "products", "full"] = free("none")
    """Activations of a block that are kept for the backward pass: all, the results of its matmuls,
    or its input alone. Each choice needs less memory than the one before, and more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_divides("num_kv_heads", "num_heads")
        self._check(self.head_dim % 2 == 0, "head_dim", "an even number")


@dataclasses.dataclass(frozen=True)
class DataConfig(_Part, prefix="data."):
    """Text and its tokens."""

    source: str = recorded("embedded")
    """The corpus: embedded, text:GLOB, tokens:GLOB, tfds:NAME, tfds_dir:PATH, hf:REPO[:CONFIG]."""
    sources: Annotated[dict[str, str], _pairs(str)] = recorded({})
    """Several corpora by name, mixed by `weights`; they replace `source`, whose name is main."""
    weights: Annotated[dict[str, float], _pairs(float)] = recorded({})
    """Relative shares of `sources` in the rows of batches; equal by default. A resume may change
    them, from its first step on."""
    held_out: Annotated[dict[str, str], _pairs(str)] = recorded({})
    """More held-out sets by name, beside that of each source: all documents of a corpus."""
    best_by: str | None = fixed(None)
    """Held-out sets whose loss is `eval/loss` and decides the best, as in web+code; by default
    those of all sources that the run begins with."""
    split: str = fixed("train")
    """Split to read, where the source has several (tfds, hf)."""
    text_field: str = fixed("text")
    """Field that holds the text (jsonl, parquet, tfds, hf); meta.text is a nested field."""
    tokenizer: str = fixed("train")
    """train (a byte-level BPE on this corpus), or a tokenizer.json: its path or name on the Hub."""
    eos_token: str | None = fixed(None)
    """The token that ends a document; found by its usual names if not given."""
    max_tokens: int | None = recorded(None, least=1)
    """Limit of training tokens to prepare; by default 1% more than num_steps needs, or 10 M. More
    steps or a higher limit add tokens to those of a run."""
    packing: Literal["windows", "documents"] = fixed("windows")
    """Rows are windows of consecutive tokens, or whole documents and padding (best-fit packing)."""
    eval_tokens: int | None = fixed(None, least=1)
    """Limit of held-out tokens of each source, in documents that are never trained on; by default
    so many that evals take a tenth of the run, and at most 2 M."""
    drop_duplicates: bool = fixed(False)
    """Drop a document whose text was there before; takes some 100 bytes of memory a document."""
    cache_dir: str | None = folder(None)
    """Folder of prepared tokens and compiled programs; by default $JAXLM_CACHE, else
    ~/.cache/jaxlm."""
    prefetch: int = free(2, least=1)
    """Batches made ahead on a host thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"source": self.source}
        for field in ("sources", "held_out"):
            given |= {f"{field}.{name}": source for name, source in getattr(self, field).items()}
        for name, source in given.items():
            kind, _, rest = source.partition(":")
            known = source == "embedded" or (kind in _KINDS and rest != "")
            _check(known, f"data.{name}", source, _SOURCES)
        self._check_sources()
        self._check(self.tokenizer != "", "tokenizer", "train, a path or a name")

    def _check_sources(self) -> None:
        for name in {**self.sources, **self.held_out}:
            field = "data.sources" if name in self.sources else "data.held_out"
            known = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{,39}", name) is not None
            _check(known, field, name, "names of up to 40 letters, digits, _, -")
        ok = not self.weights or self.weights.keys() == self.sources.keys()
        self._check(ok, "weights", f"one for each of data.sources ({', '.join(self.sources)})")
        ok = all(math.isfinite(w) and w >= 0 for w in self.weights.values())
        self._check(
            ok and (not self.weights or any(self.weights.values())),
            "weights",
            "numbers of 0 or more, not all 0",
        )
        self._check(
            sum(self.shares.values()) <= _MAX_CYCLE,
            "weights",
            f"numbers in the ratio of integers with a sum of at most {_MAX_CYCLE:,}: round them, "
            "as to 0.1234",
        )
        ok = not self.held_out.keys() & self.corpora.keys()
        self._check(ok, "held_out", f"other names than those of sources: {', '.join(self.corpora)}")
        known = {**self.corpora, **self.held_out}
        ok = {*self.judges} <= known.keys() and len({*self.judges}) == len(self.judges)
        self._check(ok, "best_by", f"names joined by +, each once, of {', '.join(known)}")

    @property
    def eval_limit(self) -> int:
        """`eval_tokens`, or the largest default."""
        return self.eval_tokens or MAX_EVAL_TOKENS

    @property
    def corpora(self) -> dict[str, str]:
        """The training sources by name; a single one is `main`."""
        return self.sources or {MAIN: self.source}

    @property
    def judges(self) -> list[str]:
        """Names of the held-out sets that decide the best: `best_by`, or those of all sources."""
        return self.best_by.split("+") if self.best_by else sorted(self.corpora)

    @property
    def shares(self) -> dict[str, int]:
        """The weights of `corpora` as integers without a common divisor, by name in sorted order.

        A batch is drawn in cycles of their sum, so that rows have these shares exactly.
        """
        weights = {name: Fraction(str(self.weights.get(name, 1))) for name in sorted(self.corpora)}
        scale = math.lcm(*(weight.denominator for weight in weights.values()))
        integers = {name: int(weight * scale) for name, weight in weights.items()}
        divisor = math.gcd(*integers.values())
        return {name: integer // divisor for name, integer in integers.items()}


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Part, prefix="optim."):
    """The optimizer and its learning rate."""

    name: Literal["muon", "adamw"] = fixed("muon")
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--optim.lr"])] = recorded(1e-3, above=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = recorded("cosine")
    """After the warmup: cosine decay, warmup-stable-decay, or constant."""
    warmup_steps: int = recorded(100, least=0, most=_MAX_SIZE)
    """Linear warmup (steps)."""
    decay_fraction: float = recorded(0.2, least=0, most=1)
    """wsd: the last fraction of num_steps, in which the rate falls linearly."""
    min_lr_ratio: float = recorded(0.1, least=0, most=1)
    """Final learning rate as a fraction of the peak (cosine and wsd)."""
    weight_decay: float = recorded(0.1, least=0)
    """Decoupled weight decay, on matrices only, scaled by the learning rate."""
    beta1: float = recorded(0.9, least=0, below=1)
    """Decay of Adam's first moment."""
    beta2: float = recorded(0.95, least=0, below=1)
    """Decay of Adam's second moment."""
    eps: float = recorded(1e-8, above=0)
    """Adam's epsilon."""
    muon_beta: float = recorded(0.95, least=0, below=1)
    """Decay of Muon's momentum."""
    muon_rms: float = recorded(0.05, above=0)
    """Root mean square of Muon's updates, before the learning rate (Adam's are about 0.2)."""
    clip_norm: float | None = recorded(1.0, above=0)
    """Clip the gradient to this global norm; None does not clip."""
    ema_decay: float | None = recorded(None, least=0, below=1)
    """Decay of a moving average of the weights, which evals and all uses of the model then take.
    A resume may start the average, from the current weights, or drop it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Part, prefix="mesh."):
    """Devices per mesh axis; at most one may be -1: all remaining devices."""

    data: int = free(-1)
    """Data parallel: batch split, params copied."""
    fsdp: int = free(1)
    """Fully sharded data parallel: batch and params split."""
    tensor: int = free(1)
    """Tensor parallel: heads, hidden layer and vocabulary split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.astuple(self)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            self._check(size == -1 or size >= 1, name, "at least 1, or -1")
        _check(sizes.count(-1) <= 1, "mesh", sizes, "at most one axis of -1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Part, prefix="checkpoint."):
    """When a checkpoint is saved, where, and for how long it is kept."""

    directory: Annotated[str | None, tyro.conf.arg(aliases=["--checkpoint-dir"])] = folder(None)
    """Folder of the checkpoints; by default RUN_DIR/checkpoints."""
    save_interval: Annotated[int, tyro.conf.arg(aliases=["--save-interval"])] = free(500, least=1)
    """Interval between saves, independent of evals (steps)."""
    save_interval_min: float | None = free(None, above=0)
    """Save also when this much time has passed since the last save (minutes)."""
    keep_latest: int = free(3, least=1)
    """Newest checkpoints to keep, in addition to the best."""
    keep_every: int | None = free(None, least=1)
    """Keep permanently each checkpoint whose step is a multiple of this (steps)."""
    keep_weights_every: int | None = free(None, least=1)
    """Keep the weights of deleted checkpoints whose step is a multiple of this (steps)."""
    on_save_error: Literal["stop", "warn"] = free("stop")
    """A failed save stops the run, or is reported while training continues (one process only)."""
    save_timeout_s: int = free(300, least=1, most=_MAX_TIMEOUT_S)
    """With several processes: time limit of a save; then all stop with an error (seconds)."""
    verify: Literal["full", "fast", "off"] = free("full")
    """At restore: full checks every array and all other files, fast not the arrays, off nothing."""
    disk_budget_gb: float | None = free(None, above=0, most=_MAX_DISK_GB)
    """Size limit of the checkpoints (10^9 bytes); milestones of `keep_every` are thinned to fit."""
    on_low_disk: Literal["warn", "refuse"] = free("warn")
    """Before the first step, if the checkpoints will not fit on the disk: warn, or do not start."""
    lock: Literal["required", "if_possible"] = free("required")
    """If the file system has no locks: do not start, or warn and rely on you to start no other."""


@dataclasses.dataclass(frozen=True)
class GuardConfig(_Part, prefix="guard."):
    """Rejection of bad steps: params and optimizer stay unchanged."""

    outlier_zscore: float | None = recorded(None, above=0)
    """Do not apply a step whose loss or gradient norm exceeds the median of the last 128 applied
    steps by this many standard deviations; by default, every finite step is applied."""
    max_skipped: int = recorded(10, least=1)
    """Stop the run after this many steps in a row that were not applied (steps)."""


@dataclasses.dataclass(frozen=True)
class TasksConfig(_Part, prefix="tasks."):
    """Tasks of EleutherAI's lm-eval during the run (extra lm-eval)."""

    names: str | None = free(None)
    """Tasks whose results are in the rows of evals, separated by commas."""
    interval: int = free(5000, least=1)
    """Interval between them, a multiple of eval_interval (steps); the last step has them too."""
    limit: int | None = free(None, least=1)
    """Limit of documents of each task."""
    include_path: str | None = folder(None)
    """A folder with your own tasks (YAML)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.include_path is None or self.names is not None
        self._check(ok, "include_path", "None without tasks.names; add --tasks.names")


@dataclasses.dataclass(frozen=True)
class TrackingConfig(_Part, prefix="tracking."):
    """Trackers that receive the metrics, in addition to the console and metrics.jsonl."""

    wandb: Literal["off", "online", "offline"] = free("off")
    """Weights & Biases."""
    wandb_project: str = free("jaxlm")
    """W&B project."""
    tensorboard: bool = free(False)
    """Write TensorBoard event files to RUN_DIR/tensorboard."""


@dataclasses.dataclass(frozen=True)
class Config(_Part):
    """All settings of a run."""

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
    tasks: TasksConfig = free(TasksConfig())
    """The tasks."""
    tracking: TrackingConfig = free(TrackingConfig())
    """The trackers."""
    num_steps: int = recorded(1000, least=1, most=_MAX_SIZE)
    """Updates in the whole run (steps)."""
    batch_size: int = fixed(16, least=1, most=_MAX_SIZE)
    """Sequences per step, over all devices."""
    seq_len: int = fixed(256, least=1, most=_MAX_SIZE)
    """Tokens per sequence."""
    num_microbatches: int = recorded(1, least=1)
    """Gradient accumulation: number of parts of a batch, computed one after the other."""
    loss_chunks: int = free(1, least=1)
    """Parts of the sequence whose logits are computed one after the other, and again in the
    backward pass: a large vocabulary then takes less memory, and the step a little longer."""
    z_loss: float = recorded(0.0, least=0)
    """Weight of the squared log-normalizer (PaLM used 1e-4), a term of the gradient that
    `train/loss` leaves out."""
    deterministic: bool = recorded(True)
    """On a GPU: use only deterministic kernels, the same at each start. Otherwise a resumed run
    differs by rounding. CPU and TPU give the same bits anyway."""
    seed: int = fixed(0, least=0, most=2**32 - 1)
    """Seed of the initial weights and of the data order."""
    eval_interval: int = free(500, least=1)
    """Interval between evals, which save if the best improved (steps)."""
    stop_after_worse_evals: int | None = free(None, least=1)
    """End the run after this many evals in a row without a new best; by default never."""
    log_interval: int = free(10, least=1)
    """Interval between logged and printed rows (steps)."""
    profile: int = free(0, least=0)
    """Trace this many steps, from the sixth of this start on, to RUN_DIR/profile (steps)."""
    sample_prompt: str | None = free(None)
    """Once the run is complete, print the best model's continuation of this text, if given."""
    overfit_one_batch: bool = fixed(False)
    """Train on batch 0 only: a first check that the model can learn."""
    branch_from: str | None = free(None)
    """Start a new run from the full state of RUN@STEP (STEP: best, latest, final or a number)."""
    init_from: str | None = free(None)
    """Start a new run, at step 0, from the weights of RUN@STEP alone."""
    run_dir: str = folder("runs/default")
    """Folder of the run; launch.py names it runs/CONFIG by default."""
    resume: Literal["auto", "best", "never"] = free("auto")
    """If there are checkpoints, `auto` resumes from the latest sound one, `best` goes back to the
    best, once, and `never` ends with an error: the run must be new."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_divides("num_microbatches", "batch_size")
        self._check_divides("loss_chunks", "seq_len")
        warmup = self.optim.warmup_steps
        _check(
            warmup < self.num_steps or self.num_steps == 1,
            "optim.warmup_steps",
            warmup,
            f"less than num_steps ({self.num_steps}); "
            f"add --optim.warmup_steps {self.num_steps // 10}",
        )
        _check(
            self.tasks.names is None or self.tasks.interval % self.eval_interval == 0,
            "tasks.interval",
            self.tasks.interval,
            f"a multiple of eval_interval; set --tasks.interval {10 * self.eval_interval}",
        )
        self._check(
            self.branch_from is None or self.init_from is None,
            "init_from",
            "nothing beside branch_from, which takes the whole state",
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return self.batch_size * self.seq_len

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one microbatch, and in one batch of an eval."""
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
      ValueError: an unknown field, a value of another type, or one that its rule refuses.
    """
    return validate(values, Config)


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
    """The fields that differ, with the policy of each."""
    before, after = leaves(old), leaves(new)
    return [
        Change(name, before[name][0], value, policy)
        for name, (value, policy) in after.items()
        if value != before[name][0]
    ]
