"""New tokens a second beside `generate` of transformers: same weights, prompt, threads, float32.

    uv run --group parity python benchmarks/sample_speed.py [TURNS]

Greedy, so that both must write the same tokens. Compilation and a first call are not counted; the
turns alternate.
"""

import sys
import time
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from flax import nnx
from transformers import (  # pyright: ignore[reportMissingImports]
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jaxlm.config import ModelConfig
from jaxlm.device.model import model_factory
from jaxlm.inference.sample import _CHUNK, Sampling, sample
from jaxlm.launch import load_config

PROMPT, NEW = 32, 128
MEDIUM = ModelConfig(
    vocab_size=16_384,
    num_layers=8,
    d_model=512,
    d_ff=1536,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    qk_norm=True,
)


def same_models(config: ModelConfig) -> tuple[Any, Any]:
    """One of ours and one of transformers, with random weights that are equal."""
    graphdef, state = nnx.split(model_factory(config, "cpu")(nnx.Rngs(params=0)))
    rng = np.random.RandomState(0)
    params = jax.tree.map(
        lambda leaf: (
            1 + 0.1 * rng.randn(*leaf.shape) if leaf.ndim == 1 else 0.05 * rng.randn(*leaf.shape)
        ).astype(np.float32),
        nnx.to_pure_dict(state),
    )
    D = config.d_model
    weights = {
        "model.embed_tokens.weight": params["embedding_VD"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head_DV"].T,
    }
    for number, layer in params["layers"].items():
        at, attention, mlp = f"model.layers.{number}.", layer["attention"], layer["mlp"]
        weights |= {
            at + "input_layernorm.weight": layer["attention_norm"]["scale"],
            at + "post_attention_layernorm.weight": layer["mlp_norm"]["scale"],
            at + "self_attn.q_proj.weight": attention["w_q_DNH"].reshape(D, -1).T,
            at + "self_attn.k_proj.weight": attention["w_k_DKH"].reshape(D, -1).T,
            at + "self_attn.v_proj.weight": attention["w_v_DKH"].reshape(D, -1).T,
            at + "self_attn.o_proj.weight": attention["w_o_NHD"].reshape(-1, D).T,
            at + "self_attn.q_norm.weight": attention["q_norm"]["scale"],
            at + "self_attn.k_norm.weight": attention["k_norm"]["scale"],
            at + "mlp.gate_proj.weight": mlp["w_gate_DF"].T,
            at + "mlp.up_proj.weight": mlp["w_up_DF"].T,
            at + "mlp.down_proj.weight": mlp["w_down_FD"].T,
        }
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=D,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    tensors = {name: torch.tensor(np.ascontiguousarray(w)) for name, w in weights.items()}
    theirs.load_state_dict(tensors, strict=True)
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, params)), theirs


def main(turns: int) -> None:
    """Prints tokens a second and their ratio, for each model and batch size."""
    for name, config in (("5m", load_config("benchmarks/5m.py").model), ("medium", MEDIUM)):
        ours, theirs = same_models(config)
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(ours)))
        for batch in (1, 8):
            prompts = np.random.RandomState(1).randint(0, config.vocab_size, (batch, PROMPT))

            def run_ours(prompts: Any = prompts, ours: Any = ours) -> np.ndarray:
                return np.stack(sample(ours, prompts, Sampling(NEW, temperature=0)))

            def run_theirs(prompts: Any = prompts, theirs: Any = theirs) -> np.ndarray:
                ids = torch.tensor(prompts)
                with torch.inference_mode():
                    out = theirs.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=NEW,
                        min_new_tokens=NEW,
                        do_sample=False,
                    )
                return out[:, PROMPT:].numpy()

            same = (run_ours() == run_theirs()).mean()
            calls, seconds = {"ours": run_ours, "theirs": run_theirs}, {"ours": [], "theirs": []}
            for _ in range(turns):
                for who, call in calls.items():
                    start = time.perf_counter()
                    call()
                    seconds[who].append(time.perf_counter() - start)
            rates = {who: batch * NEW / np.median(taken) for who, taken in seconds.items()}
            ratios = [f"{b / a:.2f}" for a, b in zip(*seconds.values(), strict=True)]
            print(
                f"{name} ({count / 1e6:.1f} M), batch {batch}, chunk {_CHUNK}: "
                f"{rates['ours']:.0f} tokens/s, transformers {rates['theirs']:.0f}; "
                f"ratio by turn {', '.join(ratios)}; same tokens {same:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
