"""`jaxlm export` and `jaxlm import`: to and from Hugging Face model folders."""

import math
from typing import Literal

from jaxlm.cli.arguments import Folder, Run, RunAtStep
from jaxlm.cli.output import notes, show
from jaxlm.errors import InputError


def export(
    run: RunAtStep,
    folder: Folder,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_gb: float = 5.0,
    push: str | None = None,
    json: bool = False,
) -> int:
    """Write a checkpoint as a folder that transformers, vLLM, ctranslate2 and llama.cpp read.

    Args:
      run: RUN@STEP; STEP is best, latest, final or a number, and best if left out.
      folder: the new folder, missing or empty.
      dtype: dtype of the weights.
      max_shard_gb: maximum size of a file of weights (10^9 bytes).
      push: upload the folder to this repo of the Hugging Face Hub (OWNER/NAME); private if new.
      json: print JSON.

    Examples:
      jaxlm export runs/tiny@best tiny-hf
      jaxlm export runs/tiny@best tiny-hf --dtype bfloat16 --push me/tiny
    """
    from jaxlm.interchange.export import export

    if not 0 < max_shard_gb * 1e9 < math.inf:
        raise InputError(f"max_shard_gb: found {max_shard_gb}, expected a number above 0")
    size = int(max_shard_gb * 1e9)
    with notes(json):
        done = export(run, folder, dtype=dtype, max_shard_bytes=size, push=push)
    lines = [
        f"{done.folder}: step {done.step} as {done.architecture}, {done.num_params:,} parameters "
        f"in {done.dtype}",
        f"  {', '.join(done.files)}",
        f"  load it: AutoModelForCausalLM.from_pretrained({done.folder!r})",
    ]
    if done.own_tokenizer:
        lines.append(
            "  llama.cpp's converter does not know this tokenizer: its pre-tokenizer is "
            "`gpt-2` (see docs/interchange.md)"
        )
    if done.url:
        lines.append(f"  pushed: {done.url}")
    show(done._asdict(), "\n".join(lines), json)
    return 0


def import_folder(folder: Folder, run: Run, *, json: bool = False) -> int:
    """Make a run that begins with the weights of a Hugging Face folder (Llama, Qwen3).

    Args:
      folder: a folder with config.json, safetensors and tokenizer.json.
      run: the new run folder, missing or empty.
      json: print JSON.

    Examples:
      jaxlm import Qwen3-0.6B runs/qwen
    """
    from jaxlm.interchange.importing import import_folder

    with notes(json):
        done = import_folder(folder, run)
    text = (
        f"{done.run}: step 0, {done.num_params:,} parameters from {', '.join(done.dtypes)}\n"
        f"  train: python launch.py --config {done.config} --data.source text:GLOB\n"
        f"  evaluate: jaxlm eval {done.run}@0 --source text:GLOB"
    )
    show(done._asdict(), text, json)
    return 0
