"""Fingerprints of arrays: integers that any changed bit changes, equal under any sharding."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.device.sharding import replicated
from jaxlm.device.state import path_name


def fingerprint(tree: Any) -> dict[str, list[Any]]:
    """The fingerprint of each array: leaf name -> [dtype, shape, lane, lane].

    A lane is the sum, modulo 2^32, of the leaf's 32-bit words, each mixed with its place in the
    *global* array. Integer sums are equal under any sharding. A single changed word always changes
    both lanes; any other damage is missed with probability 2^-64.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One after the other: numpy arrays may not fit on the device all at once.
    of_each = (fingerprint_async({path_name(path): leaf})()[0] for path, leaf in leaves)
    return {name: entry for entries in of_each for name, entry in entries.items()}


PendingFingerprint = Callable[[], tuple[dict[str, list[Any]], list[str]]]
"""Waits for the fingerprint, and the names of leaves with a NaN or an infinity."""


def fingerprint_async(tree: Any) -> PendingFingerprint:
    """Starts one pass over all leaves; the caller may donate them once this returns."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    about = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}
    # One call a layer: equal layers share a program, and a call a leaf would fill the queue.
    names = sorted(leaves, key=_layer_of)
    groups = itertools.groupby(names, _layer_of)
    on_device = [_fingerprint_group([leaves[name] for name in group]) for _, group in groups]

    def finish() -> tuple[dict[str, list[Any]], list[str]]:
        found = dict(zip(names, np.concatenate(on_device).tolist(), strict=True))
        fingerprints = {name: [*about[name], *found[name][:2]] for name in about}
        return fingerprints, [name for name in about if found[name][2]]

    return finish


def _layer_of(name: str) -> str:
    # `layers/3` in all trees of the state.
    return (re.findall(r"\w+/\d+(?=/)", name) or [""])[-1]


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32 [n, …]: narrow types widened, 64-bit ones as two words."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    x = x.reshape(x.shape or (1,))
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    # The finalizer of MurmurHash3 (public domain): a bijection; each bit affects half of the bits.
    # Weighted words are not enough: two flipped signs cancel under any weights.
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _spread(place: jax.Array, odd: int) -> jax.Array:
    # Positions that differ by a high power of two give products that differ in one bit, and two
    # flips would cancel: mix the position too.
    place = place * np.uint32(odd)
    return place ^ (place >> 15)


@jax.jit
def _fingerprint_group(leaves: list[jax.Array]) -> jax.Array:
    # uint32 [n, 3], whole on each device.
    found = jnp.stack([_fingerprint_leaf(leaf) for leaf in leaves])
    mesh: Any = jax.typeof(leaves[0]).sharding.mesh  # an abstract one
    return found if mesh.empty else jax.lax.with_sharding_constraint(found, replicated(mesh))


@jax.jit  # traced once for all leaves of a shape
def _fingerprint_leaf(x: jax.Array) -> jax.Array:
    # uint32 [3]: two lanes, and whether anything is not finite.
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    bad = ~jnp.isfinite(x) if is_float else jnp.zeros(x.shape, bool)
    bad = bad.reshape(*x.shape, *[1] * (words.ndim - x.ndim))
    # One reduce of three operands: three separate sums take 25 times as long, and temporaries of
    # the size of the leaf.
    found = jax.lax.reduce(
        (
            _mix(words ^ _spread(place, 0x9E3779B1)),
            _mix(words ^ _spread(place, 0x85EBCA77)),
            jnp.broadcast_to(bad, words.shape).astype(jnp.uint32),
        ),
        (np.uint32(0), np.uint32(0), np.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]),
        tuple(range(words.ndim)),
    )
    return jnp.stack(found)
