"""Whole documents in rows: each token once, no row too long, the same plan whatever grows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import packing
from jaxlm.data.batches import TrainBatches
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import Packed, best_fit, make_plan
from jaxlm.data.shards import TokenShards

EOS = 0


def by_hand(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing as its definition says: the items of each row."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [room - sum(lengths[i] for i in row) - lengths[item] for row in rows]
        fit = [number for number in range(len(rows)) if left[number] >= 0]
        if fit:
            rows[min(fit, key=lambda number: left[number])].append(item)
        else:
            rows.append([item])
    return rows


@given(lengths=st.lists(st.integers(1, 12), max_size=40), room=st.integers(12, 15))
@settings(max_examples=200, deadline=None)
def test_it_is_best_fit_decreasing(lengths, room):
    row_of = best_fit(np.array(lengths, int), room)
    fill = np.bincount(row_of, lengths, minlength=1).astype(int)
    assert fill.max() <= room and (not lengths or fill.min() > 0)
    # Rows that are equally full may be chosen in another order.
    expected = sorted(sum(lengths[i] for i in row) for row in by_hand(lengths, room))
    assert sorted(fill[fill > 0].tolist()) == expected


def documents_of(lengths: list[int]) -> tuple[TokenShards, np.ndarray]:
    """Documents whose tokens are positions, but for their EOS, and where each ends."""
    ends = np.cumsum(lengths)
    tokens = np.arange(1, ends[-1] + 1, dtype="<u4")
    tokens[ends - 1] = EOS
    return TokenShards([tokens]), ends


DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=DOCUMENTS, seq_len=st.integers(1, 12), group=st.integers(1, 300), data=st.data())
@settings(max_examples=200, deadline=None)
def test_each_token_is_a_target_once(lengths, seq_len, group, data):
    tokens, ends = documents_of(lengths)
    cut = data.draw(st.integers(1, tokens.num_tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GROUP_TOKENS", group)
        stages = sorted({cut, tokens.num_tokens})
        plan, before = (
            make_plan(ends, stages, seq_len),
            make_plan(ends[ends <= cut], [cut], seq_len),
        )
    rows = Packed(tokens, seq_len, plan, EOS)
    found, mask = rows.read(np.arange(rows.sizes[-1]))
    # A place where a token is a target: its number, or that of the EOS by the token before.
    positions, heads = [], []
    for row, (tokens_T, mask_T) in enumerate(zip(found, mask, strict=True)):
        spans = np.concatenate([np.arange(*span) for span in rows.ranges(row)])
        assert 0 < len(spans) <= seq_len + 1
        np.testing.assert_array_equal(tokens_T[: len(spans)], tokens.read(0, ends[-1])[spans])
        assert (tokens_T[len(spans) :] == EOS).all() and not mask_T[len(spans) - 1 :].any()
        positions += spans[1:][mask_T[: len(spans) - 1] == 1].tolist()
        heads.append(int(spans[0]))
    missing = {*range(tokens.num_tokens)} - {*positions}
    assert len(positions) == len({*positions}) and missing <= {*heads}
    assert rows.padding == pytest.approx(1 - mask.mean(dtype=np.float64))
    # What fits is not cut, and what grows keeps its rows.
    begins = {0, *ends.tolist(), cut}
    for begin, end in zip(sorted(begins), sorted(begins)[1:], strict=False):
        if end - begin <= seq_len + 1:
            assert any((begin, end) in rows.ranges(row) for row in range(rows.sizes[-1]))
    for row in range(before.sizes[-1]):
        assert Packed(tokens, seq_len, before, EOS).ranges(row) == rows.ranges(row)
    assert rows.sizes[0] == before.sizes[-1]


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 20_000).astype(int) + 1
    tokens, ends = documents_of(lengths.tolist())
    rows = Packed(tokens, 1024, make_plan(ends, [tokens.num_tokens], 1024), EOS)
    assert rows.padding < 0.01


def test_batches_of_packed_rows_have_a_mask() -> None:
    tokens, ends = documents_of([5, 3, 9, 30, 2, 2, 8] * 4)
    rows = Packed(tokens, 10, make_plan(ends, [tokens.num_tokens], 10), EOS)
    shares = {"a": 1, "b": 2}
    mixture = Mixture([{"step": 0, "shares": shares, "stages": {}}], 6)
    batches = TrainBatches(dict.fromkeys(shares, rows), mixture, batch_size=6, seed=0)
    whole = batches(3)
    assert {name: of.shape for name, of in whole.items()} == dict.fromkeys(whole, (6, 10))
    assert 0 < whole["loss_mask"].mean() < 1
    for start in range(6):
        part = batches(3, slice(start, start + 1))
        for name, rows_of in whole.items():
            np.testing.assert_array_equal(part[name], rows_of[start : start + 1])


class _Dataset:
    source, eos_id, fingerprint = "text:x", EOS, "1"

    def __init__(self, folder: Path, lengths: list[int]):
        self.directory, self.stages = folder, [sum(lengths)]
        self.train, _ = documents_of(lengths)


def test_a_plan_is_made_once_and_a_damaged_one_again(tmp_path: Path, lines: list[str]) -> None:
    dataset: Any = _Dataset(tmp_path / "text-x", [5, 3, 9, 30, 2, 2, 8])
    first = packing.open_rows(dataset, 10, "documents")
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    again = packing.open_rows(dataset, 10, "documents")
    assert [again.ranges(n) for n in range(again.sizes[-1])] == [
        first.ranges(n) for n in range(first.sizes[-1])
    ]
    assert sum("Packing the documents" in line for line in lines) == 1
    for place in range(0, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        packing.open_rows(dataset, 10, "documents")
        assert path.read_bytes() == sound
    dataset.fingerprint = "2"  # the plan of other data, with a checksum that fits
    packing.open_rows(dataset, 10, "documents")
    assert path.read_bytes() != sound
    dataset.fingerprint = "1"
    path.write_bytes(sound[:11])
    packing.open_rows(dataset, 10, "documents")
    assert path.read_bytes() == sound and "is damaged; it is made again" in lines[-2]
