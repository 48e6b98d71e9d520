"""The decoder transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases.

Computes the same function as `LlamaForCausalLM` (with `qk_norm`, `Qwen3ForCausalLM`) of Hugging
Face transformers, so that weights can be exchanged.

Dims: B batch, T time, D model, F feed-forward, N query heads, K key/value heads, H head dim,
V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.device.attention import Attention, cached_attention, for_platform, reference_attention
from jaxlm.device.embedding import Lookup, lookup_for, plain_lookup
from jaxlm.device.kv_cache import KVCache, Past, join
from jaxlm.device.sharding import constrain, delay_all_gather


def compute_dtype(config: ModelConfig, platform: str) -> jnp.dtype:
    """The dtype of activations on `cpu`, `gpu` or `tpu`."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def model_factory(config: ModelConfig, platform: str) -> Callable[[nnx.Rngs], "Transformer"]:
    """Rngs -> the decoder of the config, with attention, lookup and dtype of the platform."""
    attention, lookup = for_platform(platform), lookup_for(platform)
    dtype = compute_dtype(config, platform)
    return partial(Transformer, config, attention=attention, lookup=lookup, dtype=dtype)


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str | None, ...], std: float):
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), dims=dims)


def _zeros(shape: tuple[int, ...], dims: tuple[str | None, ...]):
    return nnx.Param(jnp.zeros(shape, jnp.float32), dims=dims)


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """The function x * sigmoid(x), with its derivative kept for the backward pass.

    By default XLA fuses the sigmoid into every consumer and recomputes it there: on a CPU that
    costs a fifth of the step.
    """
    return x * jax.nn.sigmoid(x)


def _silu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    sigmoid = jax.nn.sigmoid(x)
    return jax.lax.optimization_barrier((x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))))


def _silu_backward(derivative: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    return (grad * derivative,)


silu.defvjp(_silu_forward, _silu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def widen(x_BTD: jax.Array, w_DF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x @ w` in a dtype, for F much larger than D; all gradients are in the dtype of `x`.

    The gradient of `w` multiplies `x` first: in JAX's order, XLA would copy and transpose the
    gradient of the result, on a CPU a quarter of the step.
    """
    return jnp.matmul(x_BTD, w_DF, preferred_element_type=dtype)


def _widen_forward(
    x_BTD: jax.Array, w_DF: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return widen(x_BTD, w_DF, dtype), (x_BTD, w_DF)


def _widen_backward(
    dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], grad_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    x_BTD, w_DF = saved
    grad_BTF = grad_BTF.astype(x_BTD.dtype)
    return grad_BTF @ w_DF.T, jnp.einsum("BTD,BTF->DF", x_BTD, grad_BTF)


widen.defvjp(_widen_forward, _widen_backward)


def rope(x_BTNH: jax.Array, theta: float, positions_BT: jax.Array | None = None) -> jax.Array:
    """Rotates each pair (h, h + H/2) of a head by position times a frequency (2104.09864).

    Positions are 0 .. T - 1 unless given.
    """
    T, H = x_BTNH.shape[1], x_BTNH.shape[-1]
    freqs_h = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if positions_BT is None:
        positions_BT = jnp.arange(T)[None, :]
    angles_BTh = positions_BT.astype(jnp.float32)[:, :, None] * freqs_h[None, None, :]
    cos, sin = jnp.cos(angles_BTh)[:, :, None, :], jnp.sin(angles_BTh)[:, :, None, :]
    cos, sin = cos.astype(x_BTNH.dtype), sin.astype(x_BTNH.dtype)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, computed in float32 (1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), dims=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, size] -> […, size], in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse_rms * scale).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Grouped-query attention with RoPE, and RMSNorm on queries and keys by option."""

    def __init__(self, config: ModelConfig, attention: Attention, rngs: nnx.Rngs):
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.w_q_DNH = _weight(rngs, (D, N, H), ("model", "heads", "head_dim"), config.init_std)
        self.w_k_DKH = _weight(rngs, (D, K, H), ("model", "kv_heads", "head_dim"), config.init_std)
        self.w_v_DKH = _weight(rngs, (D, K, H), ("model", "kv_heads", "head_dim"), config.init_std)
        self.w_o_NHD = _zeros((N, H, D), ("heads", "head_dim", "model"))
        self.q_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.theta = config.rope_theta
        self.attention = attention

    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None, past: Past | None = None
    ) -> tuple[jax.Array, Past | None]:
        """[B, T, D] -> [B, T, D], and the past with these keys and values if one was given."""
        dtype = x_BTD.dtype
        positions_BT = None if past is None else past.positions_BT
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.w_q_DNH[...].astype(dtype))
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.w_k_DKH[...].astype(dtype))
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.w_v_DKH[...].astype(dtype))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = constrain(rope(q_BTNH, self.theta, positions_BT), "batch", None, "heads", None)
        k_BTKH = constrain(rope(k_BTKH, self.theta, positions_BT), "batch", None, "kv_heads", None)
        if past is None:
            out_BTNH = self.attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        else:
            past = past.extend(k_BTKH, v_BTKH)
            out_BTNH = cached_attention(
                q_BTNH, past.k_BKSH, past.v_BKSH, past.positions_BT, past.positions_BS
            )
        return jnp.einsum("BTNH,NHD->BTD", out_BTNH, self.w_o_NHD[...].astype(dtype)), past


class SwiGLU(nnx.Module):
    """silu(x @ gate) * (x @ up) @ down (2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.d_model, config.d_ff
        self.w_gate_DF = _weight(rngs, (D, F), ("model", "mlp"), config.init_std)
        self.w_up_DF = _weight(rngs, (D, F), ("model", "mlp"), config.init_std)
        self.w_down_FD = _zeros((F, D), ("mlp", "model"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        dtype = x_BTD.dtype
        gate_BTF = widen(x_BTD, self.w_gate_DF[...].astype(dtype), dtype)
        up_BTF = widen(x_BTD, self.w_up_DF[...].astype(dtype), dtype)
        # By name: the remat policy for products does not look into the custom gradient of `widen`.
        gate_BTF, up_BTF = (checkpoint_name(x, "product") for x in (gate_BTF, up_BTF))
        gate_BTF, up_BTF = (constrain(x, "batch", None, "mlp") for x in (gate_BTF, up_BTF))
        return (silu(gate_BTF) * up_BTF) @ self.w_down_FD[...].astype(dtype)


class Block(nnx.Module):
    """Attention, then SwiGLU, each on the normed residual stream; initially both add zero."""

    def __init__(self, config: ModelConfig, attention: Attention, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SelfAttention(config, attention, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None, past: Past | None = None
    ) -> tuple[jax.Array, Past | None]:
        """As `SelfAttention`."""
        attended, past = self.attention(self.attention_norm(x_BTD), segment_ids_BT, past)
        x_BTD = constrain(x_BTD + attended, "batch", None, None)
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), "batch", None, None), past


_REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda call: call,
    "products": partial(
        nnx.remat,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names("product"),
        ),
    ),
    "full": nnx.remat,
}


class Transformer(nnx.Module):
    """Tokens to next-token logits.

    Args:
      config: the shape.
      rngs: the stream `params` initialises the weights.
      attention: see `jaxlm.device.attention`.
      lookup: of the embedding's rows, see `jaxlm.device.embedding`.
      dtype: of the activations; params are float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        attention: Attention = reference_attention,
        lookup: Lookup = plain_lookup,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        V, D = config.vocab_size, config.d_model
        self.embedding_VD = _weight(rngs, (V, D), ("vocab", "model"), config.init_std)
        self.layers = nnx.List([Block(config, attention, rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(D, config.norm_eps)
        if not config.tie_embeddings:
            self.head_DV = _zeros((D, V), ("model", "vocab"))
        self.config = config
        self.lookup = lookup
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at every position.

        Args:
          tokens_BT: int32 [B, T].
          segment_ids_BT: int32 [B, T]; attention stays within equal ids. None is one segment.

        Returns:
          float32 [B, T, V].
        """
        x_BTD, _ = self.hidden(tokens_BT, segment_ids_BT)
        return self.readout()(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        positions_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Activations for `readout`, and the given cache with these tokens added.

        Args:
          tokens_BT: int32 [B, T].
          segment_ids_BT: as in a call of the model; only without a cache.
          cache: earlier tokens to attend to; must have T free slots.
          positions_BT: with a cache, positions of the tokens in their rows, int32 [B, T]; `NOWHERE`
            for padding, which no other token attends to.

        Returns:
          [B, T, D], in the dtype of the activations.
        """
        x_BTD = self.lookup(self.embedding_VD[...], tokens_BT, self.dtype)
        x_BTD = constrain(x_BTD, "batch", None, None)
        apply = _REMAT[self.config.remat](Block.__call__)
        pasts: list[Past | None] = [None] * len(self.layers)
        if cache is not None:
            assert positions_BT is not None and segment_ids_BT is None
            pasts = [*cache.begin(positions_BT)]
        before_BTD = x_BTD
        for number, layer in enumerate(self.layers):
            layer, before_BTD = delay_all_gather(before_BTD, layer), x_BTD
            x_BTD, pasts[number] = apply(layer, x_BTD, segment_ids_BT, pasts[number])
        cache = join([past for past in pasts if past]) if cache is not None else None
        return self.final_norm(x_BTD), cache

    def readout(self) -> Callable[[jax.Array], jax.Array]:
        """A function from `hidden` to logits, float32 [B, T, V]; weights are cast here, once."""
        if self.config.tie_embeddings:
            w_DV = self.embedding_VD[...].astype(self.dtype).T
        else:
            w_DV = self.head_DV[...].astype(self.dtype)
        f32 = jnp.dtype("float32")
        return lambda x_BTD: constrain(widen(x_BTD, w_DV, f32), "batch", None, "vocab")
