"""`jaxlm export` and `jaxlm import`: from and to the folders of Hugging Face transformers."""

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
      folder: must not be there, or be empty.
      dtype: of the weights.
      max_shard_gb: weights in files of so many bytes (10^9) at most.
      push: upload it to this repo of the Hugging Face Hub (OWNER/NAME); private, if it is new.
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
            "  llama.cpp's converter does not know a tokenizer of your own: its pre-tokenizer is "
            "`gpt-2` (see docs/interchange.md)"
        )
    if done.url:
        lines.append(f"  pushed: {done.url}")
    show(done._asdict(), "\n".join(lines), json)
    return 0


def import_folder(folder: Folder, run: Run, *, json: bool = False) -> int:
    """Make a run that begins with the weights of a folder of transformers (Llama, Qwen3).

    Args:
      folder: with config.json, safetensors and tokenizer.json.
      run: the run folder to make; must not be there, or be empty.
      json: print JSON.

    Examples:
      jaxlm import Qwen3-0.6B runs/qwen
    """
    from jaxlm.interchange.importing import import_folder

    with notes(json):
        done = import_folder(folder, run)
    text = (
        f"{done.run}: step 0, {done.num_params:,} parameters from {', '.join(done.dtypes)}\n"
        f"  go on: python launch.py --config {done.config} --data.source text:GLOB\n"
        f"  judge: jaxlm eval {done.run}@0 --source text:GLOB"
    )
    show(done._asdict(), text, json)
    return 0
