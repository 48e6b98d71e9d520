import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.batches import (
    EvalBatches,
    TrainBatches,
    prefetch,
    recorded,
)
from jaxlm.data.mixture import Mixture
from jaxlm.data.order import Order, permute
from jaxlm.data.packing import Windows
from jaxlm.data.shards import TokenShards, map_tokens


def shards(folder, lengths, dtype="<u2"):
    """Shards whose tokens are their own positions."""
    paths, start = [], 0
    for number, length in enumerate(lengths):
        paths.append(folder / f"{number}.bin")
        np.arange(start, start + length).astype(dtype).tofile(paths[-1])
        start += length
    return TokenShards([map_tokens(path, dtype) for path in paths])


def train_batches(tokens, batch_size=4, seq_len=10, seed=0):
    mixture = Mixture([{"step": 0, "shares": {"main": 1}, "stages": {}}], batch_size)
    sources = {"main": Windows(tokens, seq_len)}
    return TrainBatches(sources, mixture, batch_size=batch_size, seed=seed)


def windows_of(batches, count, seq_len=10):
    """The windows that batches 0 to count - 1 hold, where a token is its own position."""
    return np.concatenate([batches(n)["inputs"][:, 0] for n in range(count)]) // seq_len


# --- token shards


@pytest.mark.parametrize("lengths", [[50], [7, 1, 30, 12], [1] * 50])
def test_reads_cross_shards(tmp_path, lengths):
    tokens = shards(tmp_path, lengths)
    assert tokens.num_tokens == 50
    for start in range(50):
        for stop in range(start + 1, 51):
            np.testing.assert_array_equal(tokens.read(start, stop), np.arange(start, stop))
    starts = np.array([0, 3, 38, 40, 3])
    np.testing.assert_array_equal(tokens.windows(starts, 10), starts[:, None] + np.arange(10))


def test_reads_outside_are_refused(tmp_path):
    tokens = shards(tmp_path, [5, 5])
    for start, stop in [(0, 11), (-1, 3), (4, 3)]:
        with pytest.raises(IndexError, match="expected within 0 to 10"):
            tokens.read(start, stop)


def test_large_ids_survive(tmp_path):
    np.array([0, 65_536, 2**31 - 1], "<u4").tofile(tmp_path / "a.bin")
    tokens = TokenShards([map_tokens(tmp_path / "a.bin", "<u4")])
    assert tokens.windows(np.array([0]), 3).tolist() == [[0, 65_536, 2**31 - 1]]


# --- the permutation


def is_permutation(values, size):
    return sorted(values.tolist()) == list(range(size))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_permutation_is_a_bijection(size, seed, epoch):
    assert is_permutation(permute(np.arange(size), size, seed, epoch), size)


def test_control_of_bijection():
    # What comes of folding with a modulus in place of cycle walking.
    folded = permute(np.arange(100), 128, seed=0, epoch=0) % 100
    assert not is_permutation(folded, 100)


@given(size=st.integers(2**31, 2**62), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=50, deadline=None)
def test_permutation_is_64_bit_safe(size, seed, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    found = permute(np.array(indices), size, seed, epoch=0)
    assert found.min() >= 0 and found.max() < size
    assert len(set(found.tolist())) == len(indices)


def test_golden_permutation():
    # Other values mean that a run begun earlier would go on with other data. To regenerate:
    # python -c "from jaxlm.data.order import *; print(permute(np.arange(20), 20, 0, 0).tolist(),
    #     permute(np.array([0, 1, 10**12]), 2 * 10**12, 1, 7).tolist())"
    assert permute(np.arange(20), 20, seed=0, epoch=0).tolist() == GOLDEN_20
    large = permute(np.array([0, 1, 10**12]), 2 * 10**12, seed=1, epoch=7)
    assert large.tolist() == GOLDEN_LARGE


GOLDEN_20 = [2, 0, 5, 16, 13, 19, 10, 17, 3, 15, 11, 7, 1, 4, 9, 14, 12, 8, 6, 18]
GOLDEN_LARGE = [568135924367, 1355559480869, 58635058191]


def test_permutation_mixes():
    # Each of 10 places should get each of 10 windows about equally often: chi-squared with 81
    # degrees of freedom is below 140 for all but 5 of 100,000 fair shuffles.
    orders = np.array([permute(np.arange(10), 10, seed=3, epoch=e) for e in range(2000)])
    counts = np.array([np.bincount(column, minlength=10) for column in orders.T])
    assert ((counts - 200) ** 2 / 200).sum() < 140
    large = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=4).map(lambda x: np.cumsum(x).tolist()),
    rows=st.lists(st.integers(0, 100), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_source_that_grows_ends_its_pass_and_goes_on_with_what_is_new(sizes, rows, seed):
    growth = [(0, 1), *zip(sorted(rows), range(2, len(sizes) + 1), strict=False)]
    order = Order(sizes, growth, seed)
    epoch, found = order.place(np.arange(200))
    left, known, stage = set(), 0, 0
    for row, (number, place) in enumerate(zip(epoch, found, strict=True)):
        while stage < len(growth) and growth[stage][0] <= row:
            stage += 1
        size = sizes[growth[stage - 1][1] - 1]
        if not left:  # a pass begins: what the run has not seen, else all
            left = set(range(known, size)) or set(range(size))
            known = size
            if row:
                assert number > epoch[row - 1]
        left.remove(place)
    before = Order(sizes[:1], [(0, 1)], seed).place(np.arange(200))
    stop = min([row for row, _ in growth[1:]], default=200)
    for one, other in zip(before, (epoch, found), strict=True):
        np.testing.assert_array_equal(one[:stop], other[:stop])
    parts = [order.place(np.arange(200)[part])[1] for part in (slice(0, 13), slice(13, 200))]
    np.testing.assert_array_equal(np.concatenate(parts), found)


# --- training batches


def test_targets_are_the_next_tokens(tmp_path):
    batch = train_batches(shards(tmp_path, [60, 43]))(3)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert batch["inputs"].shape == batch["targets"].shape == (4, 10)
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_an_epoch_holds_each_window_once(tmp_path_factory, lengths, seed):
    lengths[0] += 10
    tokens = shards(tmp_path_factory.mktemp("tokens"), lengths)
    batches = train_batches(tokens, batch_size=1, seed=seed)
    (size,) = Windows(tokens, 10).sizes
    for epoch in range(2):
        found = [batches(epoch * size + n)["inputs"][0, 0] // 10 for n in range(size)]
        assert is_permutation(np.array(found), size)


def test_no_token_is_lost(tmp_path):
    # Of 103 tokens, 0 is never a target, and 101 and 102 do not fill a window.
    tokens = shards(tmp_path, [60, 43])
    batches = train_batches(tokens, batch_size=5)
    assert Windows(tokens, 10).sizes == [10]
    targets = np.concatenate([batches(n)["targets"].ravel() for n in range(2)])
    assert sorted(targets.tolist()) == list(range(1, 101))


def test_a_batch_crosses_epochs(tmp_path):
    # 10 windows an epoch, batches of 4: batch 2 has two rows of each epoch.
    batches = train_batches(shards(tmp_path, [101]))
    found = windows_of(batches, 5)
    assert is_permutation(found[:10], 10) and is_permutation(found[10:], 10)
    assert found[:10].tolist() != found[10:].tolist()


def test_a_batch_larger_than_the_corpus(tmp_path):
    found = windows_of(train_batches(shards(tmp_path, [35]), batch_size=8), 3)
    assert found.reshape(-1, 3).shape == (8, 3)
    assert all(is_permutation(epoch, 3) for epoch in found.reshape(-1, 3))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_slices_of_rows_make_the_whole_batch(tmp_path, kind):
    tokens = shards(tmp_path, [150, 101])
    batches = (
        train_batches(tokens, batch_size=12)
        if kind == "train"
        else EvalBatches(tokens, batch_size=12, seq_len=10)
    )

    def joined(index, bounds):
        parts = [batches(index, slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    for index in range(3):
        for bounds in ([0, 12], [0, 6, 12], [0, 1, 5, 12], list(range(13))):
            assert same(joined(index, bounds), batches(index))
    assert not same(joined(2, [0, 6, 12]), batches(1))  # control
    assert not same(joined(1, [0, 7, 6, 11]), batches(1))  # control


def test_a_seek_is_the_sequence(tmp_path):
    tokens = shards(tmp_path, [500])
    straight = [train_batches(tokens)(n) for n in range(40)]
    for n in (39, 0, 17, 12, 13):
        assert same(train_batches(tokens)(n), straight[n])
    assert not same(train_batches(tokens, seed=1)(17), straight[17])  # control
    assert not same(train_batches(tokens)(18), straight[17])  # control


def test_what_is_given_is_recorded(tmp_path):
    batches = train_batches(shards(tmp_path, [200]))
    path = tmp_path / "hashes"
    assert recorded(batches, None) is batches
    given = recorded(batches, str(path))
    for index, rows in ((0, slice(0, 4)), (1, slice(0, 2)), (1, slice(0, 2)), (1, slice(2, 4))):
        assert same(given(index, rows), batches(index, rows))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["batch"], row["rows"]) for row in rows] == [
        (0, [0, 4]), (1, [0, 2]), (1, [0, 2]), (1, [2, 4])
    ]  # fmt: skip
    hashes = [row["sha256"] for row in rows]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3


def test_far_batches_do_not_overflow(tmp_path):
    batches = train_batches(shards(tmp_path, [500]))
    assert not same(batches(2**50), batches(2**50 + 1))
    assert batches(2**50)["inputs"].min() >= 0


def test_a_corpus_shorter_than_a_window(tmp_path):
    tokens = shards(tmp_path, [10])
    with pytest.raises(ValueError, match="10 training tokens.*takes 11.*lower seq_len"):
        train_batches(tokens)
    train_batches(tokens, seq_len=9)
    assert Windows(tokens, 9).sizes == [1]


# --- eval batches


@pytest.mark.parametrize("num_tokens", [2, 10, 11, 40, 41, 42, 95])
def test_eval_covers_each_token_once_and_in_order(tmp_path, num_tokens):
    batches = EvalBatches(shards(tmp_path, [num_tokens]), batch_size=4, seq_len=10)
    found = []
    for n in range(len(batches)):
        batch = batches(n)
        assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
            ("inputs", "targets", "loss_mask"), (4, 10)
        )
        assert batch["loss_mask"].dtype == np.float32
        seen = batch["loss_mask"] == 1
        assert ((batch["loss_mask"] == 0) | seen).all()
        np.testing.assert_array_equal(batch["targets"][seen], batch["inputs"][seen] + 1)
        found += batch["targets"][seen].tolist()
    assert found == list(range(1, num_tokens))
    assert seen.any()  # No batch is padding alone.
    with pytest.raises(IndexError):
        batches(len(batches))


def test_eval_of_one_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held-out set: 1 tokens"):
        EvalBatches(shards(tmp_path, [1]), batch_size=4, seq_len=10)


# --- prefetch


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_is_in_order_and_on_another_thread():
    made_on = set()

    def make(n):
        made_on.add(threading.current_thread().name)
        return n * n

    assert list(prefetch(make, 3, 50, 4)) == [(n, n * n) for n in range(3, 50)]
    assert made_on and threading.current_thread().name not in made_on
    assert list(prefetch(make, 5, 5, 4)) == []
    assert prefetch_threads() == []


def test_prefetch_stays_depth_ahead():
    made = []
    items = prefetch(lambda n: made.append(n), 0, 100, 3)
    next(items)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    items.close()
    assert prefetch_threads() == []


def test_prefetch_makes_no_more_once_closed():
    made = []
    items = prefetch(lambda n: (made.append(n), time.sleep(0.05)), 0, 100, 8)
    next(items)
    items.close()
    assert len(made) <= 3


def test_prefetch_raises_in_its_turn_and_ends():
    def make(n):
        if n == 5:
            raise OSError("shard gone")
        return n

    found = []
    with pytest.raises(OSError, match="shard gone"):
        for n, _ in prefetch(make, 0, 100, 3):
            found.append(n)
    assert found == [0, 1, 2, 3, 4]
    assert prefetch_threads() == []


def test_prefetch_ends_when_the_loop_is_left():
    for n, _ in prefetch(lambda n: n, 0, 10**9, 3):
        if n == 3:
            break
    assert prefetch_threads() == []
