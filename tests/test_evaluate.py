import jax
import numpy as np
import pytest
from tiny_model import Bigram, blueprint_of, host_batch, mesh_of, put, trained_params

from jaxlm.data.batches import EvalBatches
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.device.loss import next_token_loss
from jaxlm.device.step import make_eval_step
from jaxlm.training.evaluate import HeldOut, Stopped, batch_sums, means

SHAPE = (8, 1, 1)
MESH = mesh_of(*SHAPE)


@pytest.fixture(scope="module")
def bigram():
    blueprint = blueprint_of(SHAPE, Bigram)
    params = blueprint.make(0).params
    return make_eval_step(blueprint, next_token_loss(), MESH), params


def losses_of(params, tokens) -> np.ndarray:
    """The loss of each token but the first, after the one before it."""
    table_VV, bias_V = (np.asarray(params[name], np.float64) for name in ("table_VV", "bias_V"))
    logits_TV = table_VV[tokens[:-1]] + bias_V
    return np.log(np.exp(logits_TV).sum(-1)) - logits_TV[np.arange(len(logits_TV)), tokens[1:]]


def eval_of(bigram, tokens, tmp_path, batch_size=8, seq_len=5):
    step, params = bigram
    path = tmp_path / "tokens.bin"
    tokens.astype("<u2").tofile(path)
    batches = EvalBatches(
        TokenShards([map_tokens(path, "<u2")]), batch_size=batch_size, seq_len=seq_len
    )
    found = means(
        batch_sums(
            step, params, HeldOut(lambda n: put(batches(n, slice(None)), MESH), len(batches))
        )
    )
    return found["loss"], len(batches)


@pytest.mark.parametrize("num_tokens", [2, 41, 42, 100, 121])
def test_padded_equals_unpadded_token_by_token(bigram, tmp_path, num_tokens):
    """One window holds 5 targets and one batch 40: full, one over, one under, and next to none."""
    tokens = np.random.RandomState(num_tokens).randint(0, 32, num_tokens)
    found, _ = eval_of(bigram, tokens, tmp_path)
    assert found == pytest.approx(losses_of(bigram[1], tokens).mean(), rel=1e-5)


def test_every_token_weighs_the_same_whatever_its_batch(bigram, tmp_path):
    tokens = np.random.RandomState(0).randint(0, 32, 42)  # batches of 40 targets and of 1
    found, count = eval_of(bigram, tokens, tmp_path)
    each = losses_of(bigram[1], tokens)
    assert count == 2
    mean_of_means = (each[:40].mean() + each[40:].mean()) / 2
    unmasked = (each.sum() + 39 * losses_of(bigram[1], np.zeros(2, int))[0]) / 80
    assert found == pytest.approx(each.mean(), rel=1e-5)
    assert found != pytest.approx(mean_of_means, rel=1e-2)
    assert found != pytest.approx(unmasked, rel=1e-2)


def test_the_same_state_gives_the_same_bits(bigram, tmp_path):
    tokens = np.random.RandomState(0).randint(0, 32, 500)
    assert eval_of(bigram, tokens, tmp_path) == eval_of(bigram, tokens, tmp_path)
    found, _ = eval_of(bigram, tokens[::-1].copy(), tmp_path)
    assert found != eval_of(bigram, tokens, tmp_path)[0]


def test_one_mesh_evaluates_as_another():
    losses = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh, blueprint = mesh_of(*shape), blueprint_of(shape)
        step = make_eval_step(blueprint, next_token_loss(), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.abstract.params)
        params = jax.device_put(trained_params(), shardings)
        losses[shape] = means(
            batch_sums(step, params, HeldOut(lambda n, mesh=mesh: put(host_batch(n), mesh), 3))
        )
    assert losses[1, 1, 1] == pytest.approx(losses[2, 2, 2], rel=1e-6)


def test_an_eval_is_stopped_between_two_batches():
    ready: list[int] = []

    class Sum:
        def __init__(self, index: int) -> None:
            self.index = index

        def block_until_ready(self) -> None:
            ready.append(self.index)

    def stops() -> bool:
        # The host waits for the devices: of what is queued, one batch at most is not done.
        assert ready == list(range(max(0, len(done) - 1)))
        return len(done) == 4

    done: list[int] = []
    with pytest.raises(Stopped):
        batch_sums(lambda _, n: done.append(n) or Sum(n), {}, HeldOut(lambda n: n, 9), stops)
    assert done == [0, 1, 2, 3]
