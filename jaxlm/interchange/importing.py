"""Imports a Hugging Face model folder as a run to train on.

The folder is not trusted: every size is checked before memory is allocated, no code in the folder
is executed, and a missing or extra tensor is an error.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import ml_dtypes  # noqa: F401 - registers the bfloat16 that safetensors uses
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.folder import TOKENIZER
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, to_dict
from jaxlm.corpus.tokenizer import find_eos, load_tokenizer, mark_eos, num_ids
from jaxlm.data.dataset import check_vocabulary
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import blueprint_of, path_name
from jaxlm.errors import InputError
from jaxlm.files.durable import expand, write_file
from jaxlm.files.ours import mark
from jaxlm.files.publish import check_free, published
from jaxlm.files.strict import read_json, shown
from jaxlm.interchange.mapping import CONFIG, INDEX, WEIGHTS, Tensor, from_hf_config, tensor_of
from jaxlm.terminal import prints_lines, progress, track
from jaxlm.training.environment import describe_environment

_log = logging.getLogger(__name__)

CONTINUE = "continue.py"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_SEQ_LEN = 2048
_HINT = "download the folder again"
_DTYPES = ("F32", "BF16", "F16")  # float32 holds each of their values


class Imported(NamedTuple):
    """The run that an import made."""

    run: str
    num_params: int
    dtypes: list[str]
    """Dtypes of the tensors in the Hugging Face folder."""
    config: str
    """Path of a config file that continues training from the run."""


class _Index(TypedDict):
    weight_map: dict[str, str]


class _Found(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


@prints_lines
def import_folder(folder: str, run: str) -> Imported:
    """Makes a run whose step 0 has the weights and the tokenizer of a Hugging Face folder.

    Args:
      folder: Hugging Face model folder: config.json, safetensors, tokenizer.json.
      run: the run folder, missing or empty; it appears only when it is complete.

    Raises:
      ValueError: the run folder is taken; or the folder is missing, is of another architecture,
        has pickled weights, or its tensors are not exactly those of its config.
    """
    source, target = Path(expand(folder, "FOLDER")), check_free(run)
    run = str(target)
    if not (source / CONFIG).is_file():
        raise InputError(
            f"{folder}: found no folder with a {CONFIG}, expected one of transformers on this disk "
            "(config.json, safetensors, tokenizer.json); `hf download OWNER/NAME --local-dir DIR` "
            "fetches one from the Hub"
        )
    hf_config = read_json(source / CONFIG, dict[str, Any])
    model, num_positions = from_hf_config(hf_config, source)
    found = find_tensors(source)
    if model.num_layers > len(found):
        raise InputError(
            f"{source / CONFIG}: num_hidden_layers: found {model.num_layers:,}, expected at most "
            f"as many as the {len(found)} tensors in the folder; {_HINT}"
        )
    tokenizer, eos_token, eos_id = _tokenizer(source, hf_config, model.vocab_size)
    copy = target / "checkpoints" / TOKENIZER
    config = Config(
        model=model,
        data=DataConfig(tokenizer=str(copy) if tokenizer else "train", eos_token=eos_token),
        optim=OptimConfig(learning_rate=3e-4),
        seq_len=max(1, min(num_positions, _MAX_SEQ_LEN)),
        run_dir=run,
    )
    mesh = make_mesh(MeshConfig())
    blueprint = blueprint_of(config, mesh)
    abstract = blueprint.abstract.params
    _check_tensors(source, abstract, found)
    with published(target) as partial:
        mark(partial)
        state = blueprint.make(0)._replace(params=_read_params(abstract, found))
        checkpoints = Checkpoints(
            partial / "checkpoints", CheckpointConfig(), on_commit=lambda *_: None
        )
        with checkpoints, progress("Saving the run"):
            checkpoints.save(state, _metadata(config, eos_id, describe_environment(mesh), folder))
        if tokenizer:
            write_file(partial / "checkpoints" / TOKENIZER, tokenizer)
        text = json.dumps(to_dict(config), indent=2) + "\n"
        write_file(partial / "config.json", text.encode())
        write_file(partial / CONTINUE, _config_file(config, run).encode())
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    dtypes = sorted({tensor.dtype for tensor in found.values()})
    return Imported(run, num_params, dtypes, str(target / CONTINUE))


def find_tensors(folder: Path) -> dict[str, _Found]:
    """Name -> file, shape and dtype of each tensor, from the headers alone.

    Raises:
      ValueError: no safetensors, a damaged file of them, or an index that does not match them.
    """
    index = _index(folder)
    files = [folder / name for name in sorted(set(index.values()) if index else {WEIGHTS})]
    if not files[0].is_file():
        raise InputError(_without_weights(folder))
    found: dict[str, _Found] = {}
    for file in files:
        for name, tensor in _header(file):
            if name in found:
                raise InputError(f"{name} is in {found[name].file.name} and {file.name}; {_HINT}")
            if index is not None and index.get(name) != file.name:
                raise InputError(f"{name} is in {file.name}, but {INDEX} does not list it; {_HINT}")
            found[name] = tensor
    if missing := sorted((index or {}).keys() - found.keys()):
        raise InputError(f"{INDEX} lists tensor {missing[0]}, but no file holds it; {_HINT}")
    return found


def _index(folder: Path) -> dict[str, str] | None:
    # Tensor -> file name; None unless the weights are in several files.
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX, _Index)["weight_map"]
    for name in index.values():
        if name != Path(name).name or not (folder / name).is_file():
            raise InputError(f"{folder / INDEX}: {shown(name)} is not a file there; {_HINT}")
    return index


def _without_weights(folder: Path) -> str:
    expected = f"expected {WEIGHTS} or {INDEX}"
    pickles = sorted(path.name for form in _PICKLES for path in folder.glob(form))
    if not pickles:
        return f"{folder}: found no weights, {expected}"
    return (
        f"{folder}: found the pickle {pickles[0]}, {expected}; a pickle can run any code when it "
        "is read, so have its maker save it as safetensors"
    )


def _header(path: Path) -> Iterator[tuple[str, _Found]]:
    # safetensors bounds the header, and checks each offset and size against the file's length.
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                about = file.get_slice(name)
                yield name, _Found(path, tuple(about.get_shape()), str(about.get_dtype()))
    except SafetensorError as error:
        raise InputError(f"{path}: not a valid safetensors file ({error}); {_HINT}") from error


def _check_tensors(folder: Path, abstract: Any, found: dict[str, _Found]) -> None:
    wanted = {tensor.name: shape for _, tensor, shape in _leaves(abstract)}
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{folder}: tensor {missing[0]} is missing{_more(missing)}; {_HINT}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise InputError(
            f"{folder}: tensor {shown(extra[0])[1:-1]} has no place in this model{_more(extra)}, "
            f"so {CONFIG} describes another model; {_HINT}"
        )
    for name, shape in wanted.items():
        tensor = found[name]
        if tensor.shape != shape:
            hint = ", so it is transposed" if tensor.shape == shape[::-1] else ""
            raise InputError(
                f"{tensor.file}: {name}: found {list(tensor.shape)}, expected {list(shape)}{hint}"
            )
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"{tensor.file}: {name}: found {tensor.dtype}, expected {', '.join(_DTYPES)}"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if names[1:] else ""


def _leaves(abstract: Any) -> Iterator[tuple[Any, Tensor, tuple[int, ...]]]:
    # Each leaf, its Hugging Face tensor, and the shape of that tensor.
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        tensor = tensor_of(path_name(path))
        yield leaf, tensor, tensor.shape(leaf.shape)


def _read_params(abstract: Any, found: dict[str, _Found]) -> Any:
    arrays = []
    for leaf, tensor, _ in track([*_leaves(abstract)], "Reading the weights"):
        file = found[tensor.name].file
        with safe_open(file, framework="np") as opened:
            array = opened.get_tensor(tensor.name).astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{file}: {tensor.name}: found NaN or infinity, expected neither")
        arrays.append(jax.device_put(tensor.from_hf(array, leaf.shape), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _tokenizer(
    folder: Path, hf_config: dict[str, Any], vocab_size: int
) -> tuple[bytes | None, str | None, int | None]:
    # Content of tokenizer.json, and name and id of the EOS token.
    path = folder / TOKENIZER
    if not path.is_file():
        _log.warning(
            f"{folder} has no {TOKENIZER}; to continue, call `train(batches=…)` with token batches"
        )
        return None, None, None
    tokenizer = load_tokenizer(path)
    check_vocabulary(str(path), num_ids(tokenizer), vocab_size)
    eos_id = hf_config.get("eos_token_id")
    eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
    name = tokenizer.id_to_token(eos_id) if type(eos_id) is int and 0 <= eos_id < 2**32 else None
    eos_id = find_eos(tokenizer, name)
    mark_eos(tokenizer, eos_id)
    return tokenizer.to_str(pretty=True).encode(), tokenizer.id_to_token(eos_id), eos_id


def _metadata(
    config: Config, eos_id: int | None, environment: dict[str, Any], source: str
) -> Metadata:
    return Metadata(
        step=0,
        tokens_seen=0,
        eval_loss=None,
        best_eval_loss=math.inf,
        best_step=None,
        num_worse_evals=0,
        final=False,
        config=to_dict(config),
        data={},
        phases=[],
        eval_set="",
        bytes_per_token=None,
        eos_id=eos_id,
        environment=environment,
        tracking_run_id="",
        lineage=[{"step": 0, "imported_from": source}],
    )


def _config_file(config: Config, run: str) -> str:
    changed = ", ".join(
        f"{f.name}={value!r}"
        for f in dataclasses.fields(config.model)
        if (value := getattr(config.model, f.name)) != f.default
    )
    data = config.data
    return f'''"""Continues from imported weights. All settings but the model may change."""

from jaxlm.config import Config, DataConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig({changed}),
    data=DataConfig(tokenizer={data.tokenizer!r}, eos_token={data.eos_token!r}),
    optim=OptimConfig(learning_rate={config.optim.learning_rate!r}),
    seq_len={config.seq_len},
    init_from={run + "@0"!r},
    run_dir={run.rstrip("/") + "-continued"!r},
)
'''
