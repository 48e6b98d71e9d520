"""Export and import: a round trip loses no bit, and what is not whole or not ours is refused."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import text_run
from safetensors.numpy import load_file, save_file
from tiny_model import names_and_leaves
from tokenizers import Tokenizer

from jaxlm.checkpoints.folder import select
from jaxlm.checkpoints.restore import restore_numpy
from jaxlm.config import ModelConfig
from jaxlm.inference.load import load_model
from jaxlm.interchange import export as export_module
from jaxlm.interchange import importing
from jaxlm.interchange.export import export
from jaxlm.interchange.importing import find_tensors, import_folder
from jaxlm.interchange.mapping import to_hf_config

# No two sizes alike, and N * H is not D.
LLAMA = ModelConfig(
    vocab_size=300,
    num_layers=2,
    d_model=16,
    d_ff=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=50.0,
    norm_eps=1e-3,
)
MODELS = {
    "llama": LLAMA,
    "llama-tied": replace(LLAMA, tie_embeddings=True),
    "qwen3": replace(LLAMA, qk_norm=True),
    "qwen3-tied": replace(LLAMA, qk_norm=True, tie_embeddings=True),
}


def params_of(run: Path) -> dict[str, np.ndarray]:
    return names_and_leaves(restore_numpy(select(f"{run}@latest").path)["params"])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert len(a) > 10
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of model -> a folder with `run`, and `out`, its export."""
    found: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp(kind)
            text_run.save_model(found[kind] / "run", MODELS[kind])
            export(str(found[kind] / "run"), str(found[kind] / "out"))
        return found[kind]

    return make


@pytest.fixture
def out(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of an export of Llama, to be spoilt at will."""
    return shutil.copytree(made("llama") / "out", tmp_path / "out")


def some(*fast: str) -> list[Any]:
    """All models; those not named are slow."""
    return [k if k in fast else pytest.param(k, marks=pytest.mark.slow) for k in MODELS]


@pytest.mark.parametrize("kind", some("llama"))
def test_the_round_trip_loses_no_bit(made, kind: str, tmp_path: Path):
    done = import_folder(str(made(kind) / "out"), str(tmp_path / "back"))
    assert same(params_of(made(kind) / "run"), params_of(tmp_path / "back"))
    assert done.num_params == sum(x.size for x in params_of(tmp_path / "back").values())
    model, metadata = load_model(f"{tmp_path}/back@0")
    assert metadata.run_config().model == MODELS[kind] == model.config
    assert metadata.eos_id == select(str(made(kind) / "run")).metadata.eos_id
    tokenizers = [
        run / "checkpoints/tokenizer.json" for run in (made(kind) / "run", tmp_path / "back")
    ]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_neither_way_takes_a_tokenizer_that_cuts(out: Path, made, tmp_path: Path):
    whole = (made("llama") / "run/checkpoints/tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_buffer(whole)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"][0]["special"] = False  # EOS
    (out / "tokenizer.json").write_text(json.dumps(values))
    import_folder(str(out), str(tmp_path / "back"))
    kept = tmp_path / "back/checkpoints/tokenizer.json"
    assert kept.read_bytes() == whole
    tokenizer.save(str(kept))  # as an older jaxlm left it
    export(str(tmp_path / "back@0"), str(tmp_path / "again"))
    assert (tmp_path / "again/tokenizer.json").read_bytes() == whole


def test_the_comparison_sees_one_bit(out: Path, made, tmp_path: Path):
    spoil_tensor(out, "model.norm.weight", lambda x: np.nextafter(x, np.float32(9)))
    import_folder(str(out), str(tmp_path / "back"))
    assert not same(params_of(made("llama") / "run"), params_of(tmp_path / "back"))


def test_bfloat16_comes_back_as_it_was(made, tmp_path: Path):
    export(str(made("llama") / "run"), str(tmp_path / "a"), dtype="bfloat16")
    done = import_folder(str(tmp_path / "a"), str(tmp_path / "back"))
    assert done.dtypes == ["BF16"]
    export(f"{tmp_path}/back@0", str(tmp_path / "b"), dtype="bfloat16")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert same(a, b) and {x.dtype for x in a.values()} == {np.dtype(ml_dtypes.bfloat16)}
    # It is float32 rounded, and nothing else.
    whole = load_file(made("llama") / "out" / "model.safetensors")
    assert same({k: x.astype(ml_dtypes.bfloat16) for k, x in whole.items()}, a)
    assert not same({k: x.astype(np.float32) for k, x in a.items()}, whole)


def test_several_files_hold_what_one_does(made, tmp_path: Path):
    export(str(made("llama") / "run"), str(tmp_path / "many"), max_shard_bytes=6000)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "many/model.safetensors").exists()
    parts = [load_file(file) for file in files]
    sizes = [sum(x.nbytes for x in part.values()) for part in parts]
    fit = [size <= 6000 or len(part) == 1 for size, part in zip(sizes, parts, strict=True)]
    assert all(fit)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {
        name: file.name for file, part in zip(files, parts, strict=True) for name in part
    }
    whole = {name: x for part in parts for name, x in part.items()}
    assert same(whole, load_file(made("llama") / "out/model.safetensors"))
    import_folder(str(tmp_path / "many"), str(tmp_path / "back"))
    assert same(params_of(made("llama") / "run"), params_of(tmp_path / "back"))


def spoil_config(out: Path, **changes: Any) -> None:
    values = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "GONE"}))


def spoil_tensor(out: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    tensors = load_file(out / "model.safetensors")
    changed = change(tensors.pop(name, np.zeros(3, np.float32)))
    if changed is not None:
        tensors[name] = np.ascontiguousarray(changed)
    save_file(tensors, out / "model.safetensors")


def to_pickle(out: Path) -> None:
    (out / "model.safetensors").rename(out / "pytorch_model.bin")


def cut(out: Path) -> None:
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-4])


def with_long_header(out: Path) -> None:
    (out / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def with_index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        (out / "model.safetensors").rename(out / "a.safetensors")
        index = json.dumps({"weight_map": weight_map})
        (out / "model.safetensors.index.json").write_text(index)

    return spoil


def nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flat[3] = np.nan
    return x


Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
TENSORS: dict[str, tuple[str, Callable[[np.ndarray], Any], str]] = {
    "missing": (Q, lambda x: None, f"{Q} is missing"),
    "extra": ("model.layers.1.self_attn.q_proj.bias", lambda x: x, "q_proj.bias has no place"),
    "layer too many": ("model.layers.2.input_layernorm.weight", lambda x: x, "layers.2.*no place"),
    "transposed": (DOWN, lambda x: x.T, rf"{DOWN}: found \[20, 16\].*so it is transposed"),
    "ill-shaped": (DOWN, lambda x: x[:, 1:], rf"{DOWN}: found \[16, 19\], expected \[16, 20\]$"),
    "flat": (DOWN, lambda x: x.ravel(), r"found \[320\]"),
    "integers": (DOWN, lambda x: x.astype(np.int32), "found I32, expected F32"),
    "float64": (DOWN, lambda x: x.astype(np.float64), "found F64"),
    "infinity": (DOWN, lambda x: np.full_like(x, np.inf), f"{DOWN}: found NaN or infinity"),
    "NaN": (DOWN, nan, f"{DOWN}: found NaN or infinity"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"model_type": "gpt2"}, "model_type: found 'gpt2'"),
    "no type": ({"model_type": "GONE"}, "model_type: found None"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClass"),
    "bias": ({"attention_bias": True}, "attention_bias: found True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type: found 'llama3'"),
    "window": ({"sliding_window": 64}, "sliding_window: found 64"),
    "layer window": ({"layer_types": ["sliding_attention"]}, "layer_types"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings: found 0"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "no width": ({"hidden_size": "GONE"}, "hidden_size: missing"),
    "text": ({"hidden_size": "16"}, "hidden_size: found '16', expected int"),
    "odd head": ({"head_dim": 5}, "head_dim"),
    "endless": ({"num_hidden_layers": 2 * 10**9}, "num_hidden_layers"),
    "wide": ({"hidden_size": 10**6}, r"embed_tokens.weight: found \[300, 16\], expected"),
    "of Qwen3": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "k_norm.*missing"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight has no place"),
    "untied theta": ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta: found '1'"),
    "small vocabulary": ({"vocab_size": 200}, "vocab_size|takes 200"),
}
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (to_pickle, "found the pickle pytorch_model.bin"),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "found no weights"),
    "cut": (cut, "not a valid safetensors file"),
    "long header": (with_long_header, "not a valid safetensors file"),
    "index out": (with_index({"x": "../a.safetensors"}), "is not a file there"),
    "index of none": (with_index({"x": "a.safetensors"}), "does not list it"),
    "config": (lambda out: (out / "config.json").write_text("[]"), "config.json: found"),
    "tokenizer": (lambda out: (out / "tokenizer.json").write_text("{}"), "tokenizer"),
}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{k: (lambda o, n=n, c=c: spoil_tensor(o, n, c), m) for k, (n, c, m) in TENSORS.items()},
    **{k: (lambda o, c=c: spoil_config(o, **c), m) for k, (c, m) in CONFIGS.items()},
    **FOLDERS,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(out: Path, tmp_path: Path, name: str):
    spoil, message = REFUSED[name]
    spoil(out)
    with pytest.raises(ValueError, match=message):
        import_folder(str(out), str(tmp_path / "runs/back"))
    left = [path.name for path in tmp_path.rglob("*") if "back" in path.name]
    assert left == []


def test_what_makes_no_difference_is_taken(out: Path, made, tmp_path: Path):
    """Else the refusals above could be of everything."""
    spoil_config(out, rope_scaling=None, hidden_act="swish", rope_parameters="GONE", unknown=1)
    spoil_tensor(out, Q, lambda x: x)
    import_folder(str(out), str(tmp_path / "back"))
    assert load_model(f"{tmp_path}/back@0")[0].config == LLAMA
    assert same(params_of(made("llama") / "run"), params_of(tmp_path / "back"))


def test_nothing_is_overwritten(out: Path, made, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/notes").write_text("mine")
    for call in (
        lambda: export(str(made("llama") / "run"), str(tmp_path / "runs")),
        lambda: export(str(made("llama") / "run"), str(tmp_path / "runs/notes")),
        lambda: import_folder(str(out), str(tmp_path / "runs")),
    ):
        with pytest.raises(ValueError, match="expected no folder or an empty one"):
            call()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    export(str(made("llama") / "run"), str(tmp_path / "empty"))
    assert (tmp_path / "empty/config.json").exists()


def test_nothing_is_left_of_an_export_that_failed(made, tmp_path: Path, monkeypatch):
    def fail(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(export_module, "_card", fail)
    with pytest.raises(OSError, match="no space"):
        export(str(made("llama") / "run"), str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_import_that_failed(out: Path, tmp_path: Path, monkeypatch):
    def fail(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(importing, "_config_file", fail)
    with pytest.raises(OSError, match="no space"):
        import_folder(str(out), str(tmp_path / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_has_the_figures_of_the_run_and_no_path(made):
    card = (made("llama") / "out/README.md").read_text()
    assert "| held-out loss (nats per token) | 2.5000 |" in card and "| step | 3 |" in card
    assert "12,288" in card and str(made("llama")) not in card and "text:x" not in card


def test_a_push_needs_a_token_before_anything_is_made(made, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="found no token"):
        export(str(made("llama") / "run"), str(tmp_path / "x"), push="me/x")
    assert not (tmp_path / "x").exists()


def test_the_headers_alone_tell_names_shapes_and_dtypes(out: Path):
    found = find_tensors(out)
    assert found[DOWN].shape == (16, 20) and found[DOWN].dtype == "F32"
    assert to_hf_config(LLAMA, seq_len=8, eos_id=1, dtype="float32")["model_type"] == "llama"
