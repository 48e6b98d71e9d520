"""What other tools make of an export, and we of theirs: the same logits, and nothing missing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_run
from safetensors.numpy import load_file, save_file
from test_interchange import LLAMA, MODELS

from jaxlm.inference.load import load_model
from jaxlm.interchange.export import export
from jaxlm.interchange.importing import import_folder

torch = pytest.importorskip("torch", reason="needs the dependency group parity")
transformers = pytest.importorskip("transformers", reason="needs the dependency group parity")

TOKENS = np.random.RandomState(0).randint(0, 300, (8, 13)).astype(np.int32)
SLOW = pytest.mark.slow
FORMS = [pytest.param(k, "bfloat16", marks=SLOW) for k in MODELS] + [(k, "float32") for k in MODELS]


def logits_of(run: str) -> np.ndarray:
    return np.asarray(load_model(run)[0](TOKENS))


def reference(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The logits of transformers in float32, and what it says of the loading."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    return logits, told


def gap(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape == (8, 13, 300) and np.abs(b).max() > 0.5
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Kind and dtype -> a folder with `run`, and `out`, its export."""
    found: dict[tuple[str, str], Path] = {}

    def make(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in found:
            folder = found[kind, dtype] = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            text_run.save_model(folder / "run", MODELS[kind])
            export(str(folder / "run"), str(folder / "out"), dtype=dtype)
        return found[kind, dtype]

    return make


@pytest.mark.parametrize(("kind", "dtype"), FORMS)
def test_transformers_computes_the_same_logits(made, kind: str, dtype: str, tmp_path: Path):
    folder, run = made(kind, dtype), f"{made(kind, dtype)}/run"
    if dtype == "bfloat16":  # of the rounded weights
        run = f"{tmp_path}/back@0"
        import_folder(str(folder / "out"), str(tmp_path / "back"))
    theirs, told = reference(folder / "out")
    assert told and not any(told.values()), told
    assert gap(logits_of(run), theirs) < 1e-4


def test_the_comparison_sees_a_wrong_key_and_a_missing_tensor(made, tmp_path: Path):
    shutil.copytree(made("qwen3") / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 60.0
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    theirs, told = reference(tmp_path / "out")
    assert not any(told.values())
    assert gap(logits_of(f"{made('qwen3')}/run"), theirs) > 1e-3
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    assert reference(tmp_path / "out")[1]["missing_keys"]


def test_transformers_reads_several_files(made, tmp_path: Path):
    export(f"{made('llama')}/run", str(tmp_path / "out"), max_shard_bytes=6000)
    theirs, told = reference(tmp_path / "out")
    assert not any(told.values())
    assert gap(logits_of(f"{made('llama')}/run"), theirs) < 1e-4


def test_the_tokenizer_gives_the_same_ids(made):
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(made("llama") / "run/checkpoints/tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(made("llama") / "out")
    text = "The cat's 12,345th mat  was\n\nodd — naïve 猫<|endoftext|> x"
    assert theirs(text)["input_ids"] == ours.encode(text).ids and len(ours.encode(text).ids) > 9
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == ours.token_to_id("<|endoftext|>")
    generation = transformers.GenerationConfig.from_pretrained(made("llama") / "out")
    assert generation.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("kind", MODELS)
def test_names_and_shapes_are_those_of_a_model_without_memory(made, kind: str):
    """What vLLM goes by."""
    config = transformers.AutoConfig.from_pretrained(made(kind) / "out")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        assert wanted.pop("lm_head.weight") == wanted["model.embed_tokens.weight"]
    tensors = load_file(made(kind) / "out/model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == wanted
    assert config.architectures[0] == type(model).__name__


@pytest.mark.parametrize("kind", ["llama", "qwen3-tied"])
@pytest.mark.parametrize("size", ["1GB", "10KB"])
def test_what_transformers_saves_is_imported(
    kind: str, size: str, tmp_path: Path, lines: list[str]
):
    torch.manual_seed(0)
    model, name = MODELS[kind], "Qwen3" if MODELS[kind].qk_norm else "Llama"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=0.3,
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (size == "10KB")
    import_folder(str(tmp_path / "theirs"), str(tmp_path / "run"))
    assert "no tokenizer.json" in lines[0]
    assert gap(logits_of(f"{tmp_path}/run@0"), reference(tmp_path / "theirs")[0]) < 1e-4
    export(f"{tmp_path}/run@0", str(tmp_path / "again"))
    assert gap(reference(tmp_path / "again")[0], reference(tmp_path / "theirs")[0]) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_ctranslate2_computes_the_same(kind: str, tmp_path: Path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs the dependency group parity")
    # Of Llama, it takes only heads that are as wide together as the model.
    model = MODELS[kind] if MODELS[kind].qk_norm else replace(MODELS[kind], head_dim=4)
    text_run.save_model(tmp_path / "run", model)
    export(f"{tmp_path}/run", str(tmp_path / "out"))
    convert = ctranslate2.converters.TransformersConverter(str(tmp_path / "out"))
    convert.convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), compute_type="float32")
    vocabulary = json.loads((tmp_path / "converted/vocabulary.json").read_text())
    assert len(vocabulary) == LLAMA.vocab_size
    tokens = [[vocabulary[i] for i in row] for row in TOKENS]
    theirs = np.asarray(generator.forward_batch(tokens, return_log_probs=False))
    assert gap(logits_of(f"{tmp_path}/run"), theirs) < 1e-4
