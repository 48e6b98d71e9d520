"""The metadata of a checkpoint: everything but its arrays."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jaxlm.config import Config, from_dict
from jaxlm.data.mixture import Phase
from jaxlm.data.run_data import Prepared, Recorded
from jaxlm.errors import InputError
from jaxlm.files.durable import write_file
from jaxlm.files.strict import jsonable, shown, validate
from jaxlm.tracking.rows import Rows

FORMAT = 6
"""Bump when the meaning of files or fingerprints changes."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The JSON item `meta` of a checkpoint."""

    step: int
    """Batches taken in."""
    tokens_seen: int
    """Tokens trained on."""
    eval_loss: float | None
    """Held-out loss at this step (nats per token); None where none was due."""
    best_eval_loss: float
    """The lowest held-out loss among the sound checkpoints then on disk and this one; infinite
    before the first eval."""
    best_step: int | None
    """The step of `best_eval_loss`."""
    num_worse_evals: int
    """Evals since the best one."""
    final: bool
    """Whether training ended here: by `num_steps`, or by `stop_after_worse_evals`."""
    config: dict[str, Any]
    """The run's config, as nested dicts."""
    data: dict[str, Prepared]
    """The datasets of the run so far, by name: sources and held-out sets."""
    phases: list[Phase]
    """The mixture of the sources, oldest first."""
    eval_set: str
    """Names and fingerprints of the held-out sets that decide the best; empty without one."""
    bytes_per_token: float | None
    """Bytes of text for each token of those sets; None if unknown."""
    eos_id: int | None
    """The token that ends a document."""
    environment: dict[str, Any]
    """Versions, devices and settings that the bits of a run depend on."""
    tracking_run_id: str
    """Identity of the run at its trackers."""
    lineage: list[dict[str, Any]]
    """Changes of settings, branches and initializations so far, oldest first."""
    rows: Rows = dataclasses.field(default_factory=Rows)
    """Length and checksum of the rows of metrics.jsonl up to this step."""
    run_id: str = ""
    """Identity of the run, equal in all its checkpoints."""
    fingerprints: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Leaf name -> [dtype, shape, lane, lane], computed on the device before the save."""
    format: int = FORMAT
    """Format of the checkpoint."""

    @property
    def bits_per_byte(self) -> float | None:
        """The eval loss in bits per byte of text, comparable between tokenizers."""
        if self.eval_loss is None or not self.bytes_per_token:
            return None
        return self.eval_loss / math.log(2) / self.bytes_per_token

    @property
    def weights_item(self) -> str:
        """The item with the weights to use: the moving average if there is one, else params."""
        has_average = any(name.startswith("ema_params/") for name in self.fingerprints)
        return "ema_params" if has_average else "params"

    def recorded_data(self, tokenizer: Path) -> Recorded | None:
        """The data of the run up to here, with its tokenizer; None with a caller's own batches."""
        if not self.phases:
            return None
        return Recorded(self.step, self.data, self.phases, tokenizer)

    def run_config(self) -> Config:
        """The config as dataclasses.

        Raises:
          ValueError: the config is not one of this version.
        """
        try:
            return from_dict(self.config)
        except ValueError as error:
            raise InputError(
                f"the config in the metadata of step {self.step}: {error} "
                f"({_writer(self.environment)})"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """JSON values; a best loss that is infinite becomes null."""
        values = {f.name: jsonable(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if not math.isfinite(self.best_eval_loss):
            values["best_eval_loss"] = None
        values["rows"] = dataclasses.asdict(self.rows)
        return values

    def write(self, folder: Path) -> None:
        """Writes this as the `meta` of a step folder that is not committed yet."""
        write_file(folder / "meta" / "metadata", json.dumps(self.to_json()).encode())

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Metadata":
        """The inverse of `to_json`.

        Raises:
          ValueError: another format, or a field is missing, unknown or of another type.
        """
        if (found := values.get("format")) != FORMAT:
            raise InputError(
                f"found format {shown(found)}, expected {FORMAT}; use the jaxlm that wrote it "
                f"({_writer(values.get('environment'))})"
            )
        if values.get("best_eval_loss", 0) is None:
            values = {**values, "best_eval_loss": math.inf}
        return validate(values, cls)


def _writer(environment: object) -> str:
    versions = environment.get("versions") if isinstance(environment, dict) else None
    found = versions.get("jaxlm") if isinstance(versions, dict) else None
    return f"written by jaxlm {shown(found)[1:-1] if isinstance(found, str) else 'of no version'}"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values, such as a config or an environment, as dotted name -> value."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
