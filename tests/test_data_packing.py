"""Packing: no token lost, none twice, no pack too long, any pack at any time."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.packing import Packer, best_fit, materialise, split_documents, split_long
from longspan.data.store import prepare
from longspan.data.tokens import Bytes
from longspan.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=60).filter(any)


def epoch(packer: Packer, number: int) -> list[tuple]:
    begin = sum(packer.epoch_packs(e) for e in range(number))
    return [packer.pack(n) for n in range(begin, begin + packer.epoch_packs(number))]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.data.packing._WINDOW_PIECES", 7)
    monkeypatch.setattr("longspan.data.packing._WINDOW_PACKS", 1)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(0, 2**40))
def test_every_token_is_in_an_epoch_exactly_once(lengths: list[int], most: int, seed: int) -> None:
    ids = np.arange(0, len(lengths), 2) if any(lengths[::2]) else np.arange(len(lengths))
    packer = Packer(np.array(lengths), ids, most, seed)
    for number in range(3):
        packs = epoch(packer, number)
        assert all(0 < sum(piece.length for piece in pack) <= most for pack in packs)
        seen = Counter(
            (piece.document, piece.start + offset)
            for pack in packs
            for piece in pack
            for offset in range(piece.length)
        )
        assert seen == Counter((i, t) for i in ids.tolist() for t in range(lengths[i]))
    assert packer.tokens == sum(lengths[i] for i in ids)
    assert packer.empty == sum(lengths[i] == 0 for i in ids)
    assert packer.split == sum(lengths[i] > most for i in ids)


@pytest.mark.usefixtures("small_windows")
def test_windows_lose_nothing_and_any_pack_can_be_had_alone() -> None:
    lengths = np.random.default_rng(0).integers(0, 40, 100)
    ids = np.arange(100)

    def fresh() -> Packer:
        return Packer(lengths, ids, 50, 3)

    one = fresh()
    stream = [one.pack(n) for n in range(sum(one.epoch_packs(e) for e in range(4)))]
    for n in (len(stream) - 1, 0, len(stream) // 2, 7, 90):
        assert fresh().pack(n) == stream[n]
        assert one.pack(n) == stream[n]
    for number in range(4):
        tokens = sum(piece.length for pack in epoch(one, number) for piece in pack)
        assert tokens == one.tokens == lengths.sum()
    assert len({one.epoch_packs(e) for e in range(4)}) > 1, "or the test shows nothing"
    assert fresh().epoch_packs(3) == one.epoch_packs(3)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 100), st.integers(0, 50))
def test_a_stream_resumes_from_its_cursor(lengths: list[int], most: int, cursor: int) -> None:
    def packer() -> Packer:
        return Packer(np.array(lengths), np.arange(len(lengths)), most, 5)

    before, after = packer(), packer()
    stream = [before.pack(n) for n in range(cursor + 5)]
    assert [after.pack(n) for n in range(cursor, cursor + 5)] == stream[cursor:]


def test_epochs_and_seeds_differ() -> None:
    lengths, ids = np.arange(1, 200), np.arange(199)
    packer = Packer(lengths, ids, 256, 0)
    assert epoch(packer, 0) != epoch(packer, 1)
    assert epoch(packer, 0) != epoch(Packer(lengths, ids, 256, 1), 0)


def test_long_documents_are_split_dropped_or_refused() -> None:
    lengths, ids = np.array([5, 25, 0, 10, 11]), np.arange(5)
    split = Packer(lengths, ids, 10, 0)
    assert (split.split, split.dropped, split.empty, split.pieces) == (2, 0, 1, 7)
    dropped = Packer(lengths, ids, 10, 0, "drop")
    assert (dropped.split, dropped.dropped, dropped.empty, dropped.tokens) == (0, 2, 1, 15)
    assert {piece.document for pack in epoch(dropped, 0) for piece in pack} == {0, 3}
    with pytest.raises(DataError, match=r"document 1 has 25 tokens.*\(2 such\)"):
        Packer(lengths, ids, 10, 0, "error")
    with pytest.raises(DataError, match="no tokens in 5 documents"):
        Packer(lengths, ids, 4, 0, "drop")
    with pytest.raises(DataError, match="no tokens in 1 documents"):
        Packer(lengths, np.array([2]), 4, 0)
    with pytest.raises(ConfigError, match="max_length 0"):
        Packer(lengths, ids, 0, 0)
    with pytest.raises(ConfigError, match="long_documents 'cut'"):
        Packer(lengths, ids, 4, 0, "cut")  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        split.pack(-1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 30))
def test_pieces_of_a_document_follow_each_other(lengths: list[int], most: int) -> None:
    index, start, length = split_long(np.array(lengths, np.int64), most)
    expected = [
        (i, s, min(most, size - s)) for i, size in enumerate(lengths) for s in range(0, size, most)
    ]
    assert list(zip(index.tolist(), start.tolist(), length.tolist(), strict=True)) == expected


def plain_best_fit(lengths: list[int], most: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [p for p in range(len(packs)) if rooms[p] >= lengths[i]]
        if not fitting:
            packs.append([])
            rooms.append(most)
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda p: rooms[p])
        packs[best].append(i)
        rooms[best] -= lengths[i]
    return packs


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_best_fit_is_the_textbook_one(lengths: list[int], most: int) -> None:
    assert best_fit(lengths, most) == plain_best_fit(lengths, most)


@settings(deadline=None)
@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 9))
def test_no_document_is_both_for_training_and_for_validation(
    count: int, share: float, seed: int
) -> None:
    train, validation = split_documents(count, share, seed)
    assert len(train) and len(validation)
    assert sorted([*train, *validation]) == list(range(count))
    assert abs(len(validation) - count * share) <= 1
    again = split_documents(count, share, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(validation, again[1])


def test_splits_that_cannot_be() -> None:
    with pytest.raises(DataError, match="at least 2"):
        split_documents(1, 0.5, 0)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            split_documents(10, share, 0)


def test_a_pack_is_read_with_the_token_that_follows_each(tmp_path: Path) -> None:
    texts = ["abcdefg", "", "hij", "k"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    store = prepare(tmp_path, "text", Bytes(), tmp_path / "cache")
    packer = Packer(store.lengths, np.arange(len(store)), 4, 0)
    pairs: dict[int, dict[int, tuple[int, int]]] = {i: {} for i in range(len(texts))}
    for pack in epoch(packer, 0):
        read = materialise(store, pack)
        assert read.tokens.dtype == read.targets.dtype == read.cu_seqlens.dtype == np.int64
        assert read.cu_seqlens[0] == 0 and read.cu_seqlens[-1] == len(read.tokens) <= 4
        for piece, begin, end in zip(pack, read.cu_seqlens, read.cu_seqlens[1:], strict=False):
            for offset in range(end - begin):
                both = (int(read.tokens[begin + offset]), int(read.targets[begin + offset]))
                pairs[piece.document][piece.start + offset] = both
    for number, text in enumerate(texts):
        ids = [*text.encode(), Bytes().end_id]
        expected = dict(enumerate(pairwise(ids)))
        assert pairs[number] == expected
