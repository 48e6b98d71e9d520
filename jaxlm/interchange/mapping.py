"""Maps parameters and config of a run to those of Hugging Face transformers, and back.

A model with `qk_norm` is a Qwen3, one without it a Llama.
"""

import math
import re
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.files.strict import shown, validate

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_IN_LAYER = {
    "attention_norm/scale": ("input_layernorm", 0),
    "attention/w_q_DNH": ("self_attn.q_proj", 1),
    "attention/w_k_DKH": ("self_attn.k_proj", 1),
    "attention/w_v_DKH": ("self_attn.v_proj", 1),
    "attention/w_o_NHD": ("self_attn.o_proj", 2),
    "attention/q_norm/scale": ("self_attn.q_norm", 0),
    "attention/k_norm/scale": ("self_attn.k_norm", 0),
    "mlp_norm/scale": ("post_attention_layernorm", 0),
    "mlp/w_gate_DF": ("mlp.gate_proj", 1),
    "mlp/w_up_DF": ("mlp.up_proj", 1),
    "mlp/w_down_FD": ("mlp.down_proj", 1),
}
_OUTSIDE = {
    "embedding_VD": ("model.embed_tokens", 0),
    "final_norm/scale": ("model.norm", 0),
    "head_DV": ("lm_head", 1),
}
# Leaf -> Hugging Face name, and number of input dims; 0 for a tensor that is stored unchanged.

_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class Tensor(NamedTuple):
    """The Hugging Face name and layout of a leaf of the params."""

    name: str
    num_inputs: int
    """Leading dims of the leaf that are summed over; 0 for a tensor that is stored unchanged."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The Hugging Face shape [out, in] of a leaf of shape `shape`."""
        n = self.num_inputs
        return (math.prod(shape[n:]), math.prod(shape[:n])) if n else shape

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf in the Hugging Face layout, contiguous."""
        if self.num_inputs:
            leaf = leaf.reshape(self.shape(leaf.shape)[::-1]).T
        return np.ascontiguousarray(leaf)  # safetensors would write a view in the wrong order

    def from_hf(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The leaf of shape `shape` from its Hugging Face tensor."""
        return np.ascontiguousarray((tensor.T if self.num_inputs else tensor).reshape(shape))


def tensor_of(leaf: str) -> Tensor:
    """The tensor of a leaf, such as `layers/0/mlp/w_up_DF`.

    Raises:
      ValueError: neither Llama nor Qwen3 has this parameter.
    """
    layer = re.fullmatch(r"layers/(\d+)/(.+)", leaf)
    found = _IN_LAYER.get(layer[2]) if layer else _OUTSIDE.get(leaf)
    if found is None:
        raise InputError(
            f"{leaf}: found a param that is not of jaxlm's own model, expected one that Llama or "
            "Qwen3 has; a custom model cannot be exported"
        )
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return Tensor(f"{prefix}{found[0]}.weight", found[1])


def to_hf_config(model: ModelConfig, *, seq_len: int, eos_id: int | None, dtype: str) -> Any:
    """The content of config.json."""
    kind = "qwen3" if model.qk_norm else "llama"
    values = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{key: getattr(model, name) for name, key in _KEYS.items()},
        "rope_theta": model.rope_theta,  # for transformers 4 and llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": seq_len,
        # EOS also begins a document. Without bos_token_id, LlamaConfig would take token 1.
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
        "use_cache": True,
    }
    more = {"use_sliding_window": False} if model.qk_norm else {"mlp_bias": False}
    return {**values, **more}


_REQUIRED = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads")
# Features that jaxlm's model lacks -> the values that mean that a model does not use them.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "hidden_act": ("silu", "swish", None),
}


def from_hf_config(values: dict[str, Any], folder: object) -> tuple[ModelConfig, int]:
    """The model of a config.json, and its maximum number of positions.

    Raises:
      ValueError: the architecture is not supported, the model uses a feature that jaxlm's model
        lacks, or a key is missing or of the wrong type.
    """
    where = f"{folder}/{CONFIG}"
    kind = validate(values.get("model_type"), str | None, "model_type")
    names = values.get("architectures") or [_ARCHITECTURES.get(kind or "")]
    if kind not in _ARCHITECTURES or names != [_ARCHITECTURES[kind]]:
        found = f"{shown(kind)} with architectures {shown(values.get('architectures'))}"
        raise InputError(
            f"{where}: model_type: found {found}, expected one of "
            f"{', '.join(f'{k} ({v})' for k, v in _ARCHITECTURES.items())}; jaxlm supports no other"
        )
    rope = validate(values.get("rope_parameters") or {}, dict[str, Any], "rope_parameters")
    rope_type = rope.get("rope_type", "default")
    extra = [(key, values.get(key)) for key, off in _ABSENT.items() if values.get(key) not in off]
    extra += [("rope_parameters.rope_type", rope_type)] if rope_type != "default" else []
    partial = rope.get("partial_rotary_factor", 1)
    extra += [("rope_parameters.partial_rotary_factor", partial)] if partial != 1 else []
    layers = validate(values.get("layer_types") or [], list[Any], "layer_types")
    extra += [("layer_types", kind) for kind in layers if kind != "full_attention"]
    if kind == "llama" and values.get("sliding_window") is not None:
        extra.append(("sliding_window", values["sliding_window"]))
    if extra:
        key, value = extra[0]
        raise InputError(
            f"{where}: {key}: found {shown(value)}, expected it unset: jaxlm's model lacks this "
            "feature, and would compute another function with these weights"
        )
    try:
        return _shape(values, rope, qk_norm=kind == "qwen3")
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _shape(values: dict[str, Any], rope: dict[str, Any], qk_norm: bool) -> tuple[ModelConfig, int]:
    found: dict[str, Any] = {"tie_embeddings": False, "norm_eps": 1e-6}  # defaults of transformers
    hints = get_type_hints(ModelConfig)
    for name, key in _KEYS.items():
        if values.get(key) is not None:
            found[name] = validate(values[key], hints[name], key)
    if not qk_norm:
        found.setdefault("num_kv_heads", found.get("num_heads"))
        if "num_heads" in found and "d_model" in found:
            found.setdefault("head_dim", found["d_model"] // max(found["num_heads"], 1))
    for name in (*_REQUIRED, "head_dim"):
        if found.get(name) is None:
            raise InputError(f"{_KEYS[name]}: missing; it is needed for the shape of the model")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    theta = validate(10_000.0 if theta is None else theta, float, "rope_theta")
    # JSON may hold 10000 for 10000.0, but a config needs floats.
    floats = {k: float(found[k]) for k in ("norm_eps", "init_std") if k in found}
    model = ModelConfig(**{**found, **floats}, rope_theta=float(theta), qk_norm=qk_norm)
    key = "max_position_embeddings"
    if (longest := validate(values.get(key, 2048), int, key)) < 1:
        raise InputError(f"{key}: found {longest}, expected at least 1")
    return model, longest
