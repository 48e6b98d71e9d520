"""The same function as `LlamaForCausalLM` and `Qwen3ForCausalLM`: logits and gradients to 1e-4.

Where torch and transformers are installed, they are the reference; elsewhere, what they computed
is read from tests/golden. Their answers are written anew by

    uv run --group parity pytest tests/parity --write-golden
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.device.attention import for_platform
from jaxlm.device.loss import cross_entropy
from jaxlm.device.model import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
# No two sizes alike, so that no two dims can be taken for each other; N * H is not D.
LLAMA = ModelConfig(
    vocab_size=12,
    num_layers=2,
    d_model=8,
    d_ff=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=50.0,
    norm_eps=1e-3,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tie_embeddings=True),
}
TOKENS = np.random.RandomState(0).randint(0, 12, (2, 11))
Arrays = dict[str, np.ndarray]


def random_weights(config: ModelConfig) -> Arrays:
    """Weights by their Hugging Face names, [out, in]; large, so that every term counts."""
    rng = np.random.RandomState(1)  # its stream is frozen: the golden files hold no weights
    D, F, H, V = config.d_model, config.d_ff, config.head_dim, config.vocab_size
    N, K = config.num_heads * H, config.num_kv_heads * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (D,),
            at + "self_attn.q_proj.weight": (N, D),
            at + "self_attn.k_proj.weight": (K, D),
            at + "self_attn.v_proj.weight": (K, D),
            at + "self_attn.o_proj.weight": (D, N),
            at + "post_attention_layernorm.weight": (D,),
            at + "mlp.gate_proj.weight": (F, D),
            at + "mlp.up_proj.weight": (F, D),
            at + "mlp.down_proj.weight": (D, F),
        }
        if config.qk_norm:
            shapes[at + "self_attn.q_norm.weight"] = (H,)
            shapes[at + "self_attn.k_norm.weight"] = (H,)
    shapes["model.norm.weight"] = (D,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return {
        name: (rng.randn(*shape) / 2 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def to_jaxlm(weights: Arrays, config: ModelConfig) -> dict[str, Any]:
    """The params of a `Transformer`, from weights by their Hugging Face names."""
    D, H = config.d_model, config.head_dim

    def layer(number: int) -> dict[str, Any]:
        def of(name: str) -> np.ndarray:
            return weights[f"model.layers.{number}.{name}.weight"]

        attention = {
            "w_q_DNH": of("self_attn.q_proj").T.reshape(D, -1, H),
            "w_k_DKH": of("self_attn.k_proj").T.reshape(D, -1, H),
            "w_v_DKH": of("self_attn.v_proj").T.reshape(D, -1, H),
            "w_o_NHD": of("self_attn.o_proj").T.reshape(-1, H, D),
        }
        if config.qk_norm:
            attention["q_norm"] = {"scale": of("self_attn.q_norm")}
            attention["k_norm"] = {"scale": of("self_attn.k_norm")}
        return {
            "attention_norm": {"scale": of("input_layernorm")},
            "attention": attention,
            "mlp_norm": {"scale": of("post_attention_layernorm")},
            "mlp": {
                "w_gate_DF": of("mlp.gate_proj").T,
                "w_up_DF": of("mlp.up_proj").T,
                "w_down_FD": of("mlp.down_proj").T,
            },
        }

    params: dict[str, Any] = {
        "embedding_VD": weights["model.embed_tokens.weight"],
        "layers": {number: layer(number) for number in range(config.num_layers)},
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        params["head_DV"] = weights["lm_head.weight"].T
    return params


def from_transformers(kind: str) -> Arrays:
    """`logits`, and the gradient of the mean loss by the name of its weight."""
    import torch
    import transformers

    config = CONFIGS[kind]
    cls = {"llama": transformers.LlamaForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[kind]
    model = cls(
        cls.config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    weights = {name: torch.from_numpy(array) for name, array in random_weights(config).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if config.tie_embeddings else []) and not unexpected
    logits = model(torch.from_numpy(TOKENS)).logits
    targets = torch.from_numpy(np.roll(TOKENS, -1, axis=1))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    grads = {name: param.grad.numpy() for name, param in model.named_parameters()}
    return {"logits": logits.detach().numpy(), **grads}


@functools.cache
def from_jaxlm(kind: str, **changes: Any) -> tuple[Any, Any]:
    """Logits, and the gradient of the mean loss as a tree of params."""
    config, attention = dataclasses.replace(CONFIGS[kind], **changes), for_platform("cpu")
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0), attention=attention))
    graphdef = nnx.split(model)[0]
    targets = np.roll(TOKENS, -1, axis=1)

    @jax.jit
    def run(params):
        def loss(params):
            logits = nnx.merge(graphdef, params)(jnp.asarray(TOKENS))
            return cross_entropy(logits, jnp.asarray(targets)).mean(), logits

        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, grads

    return run(to_jaxlm(random_weights(CONFIGS[kind]), CONFIGS[kind]))


def gap(found: tuple[Any, Any], expected: Arrays, kind: str) -> float:
    """The largest difference of any logit or gradient, as a share of the largest of its array."""
    logits, grads = found
    trees = {"logits": logits, "grads": grads}
    wanted = {"logits": expected["logits"], "grads": to_jaxlm(expected, CONFIGS[kind])}
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), trees, wanted)
    assert len(jax.tree.leaves(gaps)) > 15
    return max(jax.tree.leaves(gaps))


@pytest.fixture(scope="module", params=CONFIGS)
def golden(request) -> tuple[str, Arrays]:
    path = GOLDEN / f"{request.param}.npz"
    if request.config.getoption("--write-golden"):
        np.savez_compressed(path, allow_pickle=False, **from_transformers(request.param))
    with np.load(path) as arrays:
        return request.param, dict(arrays)


def test_logits_and_gradients_are_those_of_the_golden_file(golden):
    kind, expected = golden
    assert gap(from_jaxlm(kind), expected, kind) < 1e-4


def test_the_comparison_sees_a_small_change(golden):
    kind, expected = golden
    change = {"llama": {"rope_theta": 60.0}, "qwen3": {"norm_eps": 2e-3}}[kind]
    assert gap(from_jaxlm(kind, **change), expected, kind) > 1e-3


def test_the_comparison_sees_each_gradient(golden):
    kind, expected = golden
    found = from_jaxlm(kind)
    for name, array in expected.items():
        assert np.abs(array).max() > 1e-4, name
        assert gap(found, expected | {name: array * 1.001}, kind) > 5e-4, name


def test_transformers_itself_agrees(golden):
    """With the golden file, and so with jaxlm."""
    pytest.importorskip("torch", reason="parity with transformers itself needs torch")
    pytest.importorskip("transformers", reason="parity needs transformers")
    kind, expected = golden
    computed = from_transformers(kind)
    assert computed.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(computed[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    assert gap(from_jaxlm(kind), computed, kind) < 1e-4
