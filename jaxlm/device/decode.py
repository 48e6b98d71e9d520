"""Decoding: new tokens from a model, one after the other. Arrays in, arrays out.

Dims: B batch, P prompt, S slots, C candidates, V vocabulary, T new tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxlm.device.kv_cache import NOWHERE, KVCache, make_cache
from jaxlm.device.state import Params


class Rule(NamedTuple):
    """Static settings of sampling; each value compiles another program."""

    greedy: bool = False
    """Always choose the most likely token."""
    top_k: int | None = None
    """Sample among this number of the most likely tokens."""
    use_top_p: bool = False
    """Sample among the fewest most likely tokens whose probabilities add up to top_p."""
    eos_id: int | None = None
    """The token that ends a row."""


class Knobs(NamedTuple):
    """Settings of sampling that a program takes as arguments."""

    seed: ArrayLike
    """uint32 []."""
    temperature: ArrayLike
    """float32 []; logits are divided by it."""
    top_p: ArrayLike
    """float32 []."""


class Decoding(NamedTuple):
    """The state between two tokens."""

    cache: KVCache
    token_B: jax.Array
    """The last token of each row, int32."""
    position_B: jax.Array
    """Position of the last token in its row, int32."""
    ended_B: jax.Array
    """Whether the row has ended."""
    num_new: jax.Array
    """New tokens so far, int32 []."""


class Programs(NamedTuple):
    """Jitted functions, compiled once for each shape; `decode` donates its state."""

    prefill: Callable[..., tuple[Decoding, jax.Array]]
    """`(params, tokens_BP, length_B, knobs, num_slots) -> (state, first new token_B)`."""
    decode: Callable[..., tuple[Decoding, jax.Array]]
    """`(params, state, knobs, num_tokens) -> (state, tokens_BT)`; -1 after the end of a row."""


def candidates(
    logits_BV: jax.Array, rule: Rule, temperature: ArrayLike, top_p: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The tokens to choose from, and their logits, most likely first.

    Top-k first, then top-p (1904.09751) of the rest, as in Hugging Face transformers.

    Returns:
      float32 [B, C], -inf where a token is left out, and int32 [B, C].
    """
    V = logits_BV.shape[-1]
    scaled_BV = logits_BV / temperature
    if rule.top_k is None and not rule.use_top_p:
        return scaled_BV, jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None], logits_BV.shape)
    scaled_BC, tokens_BC = jax.lax.top_k(scaled_BV, min(rule.top_k or V, V))
    if rule.use_top_p:
        probs_BC = jax.nn.softmax(scaled_BC, axis=-1)
        before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
        kept_BC = (before_BC < top_p).at[:, 0].set(True)
        scaled_BC = jnp.where(kept_BC, scaled_BC, -jnp.inf)
    return scaled_BC, tokens_BC


def choose(logits_BV: jax.Array, rule: Rule, knobs: Knobs, count: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]: a function of seed, row, count and logits alone."""
    if rule.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BC, tokens_BC = candidates(logits_BV, rule, knobs.temperature, knobs.top_p)
    key = jax.random.fold_in(jax.random.key(knobs.seed), count)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits_BV)))
    chosen_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BC)
    return jnp.take_along_axis(tokens_BC, chosen_B[:, None], axis=-1)[:, 0]


def narrow(params: Params, dtype: jnp.dtype) -> Params:
    """The matrices in the dtype that a forward casts them to, once instead of in each step."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


@functools.lru_cache(maxsize=8)
def make_programs(graphdef: Any, mesh: Mesh | None, rule: Rule) -> Programs:
    """The programs of a model (`Transformer`) and a rule.

    Args:
      graphdef: of the model, from `nnx.split`.
      mesh: where its params are, if on a mesh.
      rule: how a token is chosen.
    """

    def in_mesh(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def traced(*args: Any) -> Any:
            if mesh is None:
                return call(*args)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return call(*args)

        return traced

    @functools.partial(jax.jit, static_argnums=4)
    @in_mesh
    def prefill(
        params: Params, tokens_BP: jax.Array, length_B: jax.Array, knobs: Knobs, num_slots: int
    ) -> tuple[Decoding, jax.Array]:
        model = nnx.merge(graphdef, params)
        B, P = tokens_BP.shape
        times_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (B, P))
        positions_BP = jnp.where(times_BP < length_B[:, None], times_BP, NOWHERE)
        cache = make_cache(model.config, B, num_slots, model.dtype)
        x_BPD, cache = model.hidden(tokens_BP, cache=cache, positions_BT=positions_BP)
        last_B1D = jnp.take_along_axis(x_BPD, (length_B - 1)[:, None, None], axis=1)
        count = jnp.zeros((), jnp.int32)
        token_B = choose(model.readout()(last_B1D)[:, 0], rule, knobs, count)
        ended_B = token_B == (-1 if rule.eos_id is None else rule.eos_id)
        return Decoding(cache, token_B, length_B, ended_B, count + 1), token_B

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
    @in_mesh
    def decode(
        params: Params, state: Decoding, knobs: Knobs, num_tokens: int
    ) -> tuple[Decoding, jax.Array]:
        model = nnx.merge(graphdef, params)

        def step(state: Decoding, _: None) -> tuple[Decoding, jax.Array]:
            x_B1D, cache = model.hidden(
                state.token_B[:, None], cache=state.cache, positions_BT=state.position_B[:, None]
            )
            token_B = choose(model.readout()(x_B1D)[:, 0], rule, knobs, state.num_new)
            told_B = jnp.where(state.ended_B, -1, token_B)
            ended_B = state.ended_B | (token_B == (-1 if rule.eos_id is None else rule.eos_id))
            after = Decoding(cache, token_B, state.position_B + 1, ended_B, state.num_new + 1)
            return after, told_B

        state, told_TB = jax.lax.scan(step, state, length=num_tokens)
        return state, told_TB.T

    return Programs(prefill, decode)
