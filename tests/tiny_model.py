"""The smallest runs that have every part, for the tests of the device room."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxlm.checkpoints.metadata import Metadata
from jaxlm.config import Config, MeshConfig, ModelConfig, OptimConfig, to_dict
from jaxlm.device.attention import Attention, reference_attention
from jaxlm.device.model import Transformer
from jaxlm.device.optim import make_optimizer
from jaxlm.device.sharding import make_mesh, put_batch
from jaxlm.device.state import Blueprint, ModelFactory, make_blueprint, path_name

# Every dim has a size of its own but for those that a mesh of 4 x 2 must divide.
MODEL = ModelConfig(
    vocab_size=32, num_layers=2, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=6
)
TRANSFORMER = functools.partial(Transformer, MODEL)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2)
NUM_STEPS, ROWS, SEQ_LEN = 10, 8, 9
ONE_DEVICE = (1, 1, 1)


class Bigram(nnx.Module):
    """A user's model: another class, no named dims, and it compiles in no time."""

    def __init__(self, rngs: nnx.Rngs):
        self.table_VV = nnx.Param(jax.random.normal(rngs.params(), (32, 32)))
        self.bias_V = nnx.Param(jnp.zeros((32,)))

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        return self.table_VV[...][tokens_BT] + self.bias_V[...][None, None]


@functools.cache
def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def blueprint_of(
    shape: tuple[int, int, int] = ONE_DEVICE,
    model: ModelFactory = TRANSFORMER,
    optim: OptimConfig = OPTIM,
) -> Blueprint:
    return make_blueprint(model, functools.partial(make_optimizer, optim), mesh_of(*shape))


def transformer(
    config: ModelConfig = MODEL, attention: Attention = reference_attention, dtype: Any = "float32"
) -> Transformer:
    """With weights of the scale of a trained model, so that nothing is lost in rounding."""
    graphdef, shapes = nnx.split(
        nnx.eval_shape(
            lambda: Transformer(
                config, nnx.Rngs(params=0), attention=attention, dtype=jnp.dtype(dtype)
            )
        )
    )
    rng = np.random.RandomState(0)

    def weight(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.randn(*leaf.shape)
        value = 1 + 0.2 * noise if leaf.ndim == 1 else noise / math.sqrt(leaf.shape[0])
        return jnp.asarray(value, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(weight, nnx.to_pure_dict(shapes)))


@functools.cache
def trained_params() -> Any:
    """Those of `transformer()`: the zeros of initial ones would hide much."""
    return nnx.to_pure_dict(nnx.state(transformer()))


@functools.cache
def initial_params() -> Any:
    """As jaxlm draws them, on one device."""
    return blueprint_of().make(0).params


def host_batch(index: int, rows: int = ROWS, seq_len: int = SEQ_LEN) -> dict[str, np.ndarray]:
    tokens = np.random.RandomState(index).randint(0, 32, (rows, seq_len + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    rows = len(batch["inputs"])
    return put_batch(lambda index: {k: v[index] for k, v in batch.items()}, mesh, rows)


def names_and_leaves(tree: Any) -> dict[str, Any]:
    """Path name -> leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def metadata_of(step: int, eval_loss: float | None = None) -> Metadata:
    """What a checkpoint says of itself, where a test asks for no more."""
    return Metadata(
        step=step,
        tokens_seen=step,
        eval_loss=eval_loss,
        best_eval_loss=math.inf,
        best_step=None,
        num_worse_evals=0,
        final=False,
        config=to_dict(Config()),
        data={},
        phases=[],
        eval_set="",
        bytes_per_token=None,
        eos_id=None,
        environment={},
        tracking_run_id="",
        lineage=[],
    )
