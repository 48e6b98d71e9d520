"""Exports a checkpoint as a Hugging Face model folder."""

import json
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import jax
import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.checkpoints.copying import check_outside
from jaxlm.checkpoints.folder import TOKENIZER, Selected, select
from jaxlm.checkpoints.reading import read
from jaxlm.config import MeshConfig
from jaxlm.corpus.tokenizer import find_eos, load_tokenizer
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import path_name
from jaxlm.errors import InputError
from jaxlm.files.publish import check_free, published
from jaxlm.inference.load import log_selected, restore_params
from jaxlm.interchange.mapping import (
    CONFIG,
    GENERATION,
    INDEX,
    TOKENIZER_CONFIG,
    tensor_of,
    to_hf_config,
)
from jaxlm.terminal import prints_lines, track
from jaxlm.tracking.metrics import perplexity

_log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]


class Exported(NamedTuple):
    """The result of an export."""

    folder: str
    step: int
    architecture: str
    dtype: str
    num_params: int
    files: list[str]
    own_tokenizer: bool
    """Whether llama.cpp's converter must be given the name of the pre-tokenizer."""
    url: str | None
    """URL of the commit on the Hub, if pushed."""


@prints_lines
def export(
    run: str,
    folder: str,
    *,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 5 * 10**9,
    push: str | None = None,
) -> Exported:
    """Writes weights, tokenizer, configs and model card of `RUN@STEP` to a new folder.

    Args:
      run: `RUN@STEP`; best if STEP is left out.
      folder: the new folder, missing or empty; it appears only when it is complete.
      dtype: of the exported weights, which are float32 in the run.
      max_shard_bytes: maximum size of a file of weights, unless a single tensor is larger.
      push: a repo of the Hugging Face Hub (OWNER/NAME) to upload the folder to; private if new.

    Raises:
      ValueError: no such checkpoint, it is damaged or of a custom model; the folder is taken; or
        there is no token for the Hub.
    """
    target = check_free(folder)
    if push and huggingface_hub.get_token() is None:
        raise InputError(
            "push: found no token of the Hugging Face Hub, expected $HF_TOKEN or that of "
            "`hf auth login`; give one, or leave --push out"
        )
    selected = select(run, contents=False)
    check_outside(target, selected.folder)
    mesh = make_mesh(MeshConfig())
    selected, (_, params) = read(run, lambda s: (s, restore_params(s, mesh)))
    log_selected(selected)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    with published(target) as partial:
        _write_weights(partial, params, dtype, max_shard_bytes)
        own = _write_about(partial, selected, dtype)
        (partial / "README.md").write_text(_card(selected, target.name, num_params, dtype))
        files = sorted(path.name for path in partial.iterdir())
    url = _push(target, push) if push else None
    architecture = "Qwen3" if selected.metadata.run_config().model.qk_norm else "Llama"
    return Exported(str(target), selected.step, architecture, dtype, num_params, files, own, url)


def _write_weights(folder: Path, params: Any, dtype: Dtype, max_shard_bytes: int) -> None:
    leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    itemsize = np.dtype(dtype).itemsize
    split = huggingface_hub.split_state_dict_into_shards_factory(
        leaves,
        get_storage_size=lambda leaf: leaf.size * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    where = {}
    for file, names in track([*split.filename_to_tensors.items()], "Writing the weights"):
        shard = {name: leaves[name] for name in names}
        where |= dict.fromkeys(_write_shard(folder / file, shard, dtype), file)
    if split.is_sharded:
        total = sum(leaf.size for leaf in leaves.values())
        about = {"total_parameters": total, **split.metadata}
        _write_json(folder / INDEX, {"metadata": about, "weight_map": where})


def _write_shard(path: Path, shard: dict[str, jax.Array], dtype: Dtype) -> list[str]:
    tensors = {}
    for name, leaf in shard.items():
        tensor = tensor_of(name)
        tensors[tensor.name] = tensor.to_hf(np.asarray(leaf)).astype(dtype)
    save_file(tensors, path, metadata={"format": "pt"})  # required by transformers
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors sets 0600
    with safe_open(path, framework="np") as file:
        for name, wanted in tensors.items():
            if file.get_tensor(name).tobytes() != wanted.tobytes():
                raise InputError(
                    f"{name}: {path.name} differs from what was written; check the disk"
                )
    return list(tensors)


def _write_about(folder: Path, selected: Selected, dtype: Dtype) -> bool:
    # Writes configs and tokenizer; returns whether jaxlm trained the tokenizer.
    metadata = selected.metadata
    config, eos_id = metadata.run_config(), metadata.eos_id
    hf_config = to_hf_config(config.model, seq_len=config.seq_len, eos_id=eos_id, dtype=dtype)
    _write_json(folder / CONFIG, hf_config)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_id)
    _write_json(folder / GENERATION, {**ids, "do_sample": True})
    own = False
    if (source := selected.folder / TOKENIZER).is_file():
        tokenizer = load_tokenizer(source)
        eos_id = find_eos(tokenizer, config.data.eos_token) if eos_id is None else eos_id
        ends = ("bos_token", "eos_token", "pad_token")  # EOS also precedes each document
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(ends, tokenizer.id_to_token(eos_id)),
            "model_max_length": config.seq_len,
            "clean_up_tokenization_spaces": False,
        }
        (folder / TOKENIZER).write_bytes(tokenizer.to_str(pretty=True).encode())
        _write_json(folder / TOKENIZER_CONFIG, about)
        # A tokenizer.json may come from another run that trained it.
        own = config.data.tokenizer == "train" or Path(config.data.tokenizer).name == TOKENIZER
    else:
        _log.warning(f"{selected.folder} holds no {TOKENIZER}: the folder gets none either")
    return own


def _card(selected: Selected, name: str, num_params: int, dtype: str) -> str:
    metadata = selected.metadata
    config = metadata.run_config()
    # A public card must not show local paths.
    local = {"text": "text files", "tokens": "token files", "tfds_dir": "a folder of TFDS"}
    sources = [local.get(s.partition(":")[0], s) for s in config.data.corpora.values()]
    rows = {
        "parameters": f"{num_params:,}",
        "layers, width": f"{config.model.num_layers}, {config.model.d_model}",
        "step": f"{metadata.step:,}",
        "tokens trained on": f"{metadata.tokens_seen:,}",
        "sequence length": f"{config.seq_len:,}",
        "data": ", ".join(dict.fromkeys(sources)),
        "data fingerprint": ", ".join(of["fingerprint"] for of in metadata.data.values()) or "none",
        "optimizer, peak learning rate": f"{config.optim.name}, {config.optim.learning_rate:g}",
        "dtype of the weights": dtype,
    }
    if (loss := metadata.eval_loss) is not None:
        rows["held-out loss (nats per token)"] = f"{loss:.4f}"
        rows["held-out perplexity"] = f"{perplexity(loss):.2f}"
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- jaxlm\n---\n\n"
        f"# {name}\n\nA pretrained language model, exported from a checkpoint of jaxlm. It "
        "continues text; it was not taught to follow instructions.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _push(folder: Path, repo: str) -> str:
    api = huggingface_hub.HfApi()
    api.create_repo(repo, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=str(folder)).commit_url)
