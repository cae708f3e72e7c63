"""Token lengths from a sample: close to the truth, and honest about how close."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from longspan.data.diagnose import diagnose
from longspan.data.render import render
from longspan.data.sample import choose, estimate
from longspan.data.tokens import FromFile


def corpus(documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters and tokens of documents with a long tail; long ones have longer tokens."""
    random = np.random.default_rng(seed)
    characters = np.rint(random.lognormal(7, 1.5, documents)).astype(np.int64)
    ratio = random.normal(0.28, 0.05, documents) - 0.01 * np.log10(characters + 1)
    return characters, np.maximum(1, np.rint(characters * ratio)).astype(np.int64)


def test_the_tail_is_not_missed_as_a_plain_sample_misses_it() -> None:
    off, plain_off, inside = [], [], []
    for seed in range(12):
        characters, tokens = corpus(40_000, seed)
        taken = choose(characters, 2048, seed)
        assert len(taken) <= 2048 + 64
        found = estimate(characters, {int(i): int(tokens[i]) for i in taken}, seed)
        truth, guess = (np.percentile(x, 99) for x in (tokens, found.lengths))
        plain = np.random.default_rng(seed).choice(tokens, 2048, replace=False)
        off.append(abs(guess / truth - 1))
        plain_off.append(abs(np.percentile(plain, 99) / truth - 1))
        low, high = found.intervals["tokens"]
        inside.append(low <= tokens.sum() <= high)
        assert found.lengths.max() == tokens.max(), "the longest are all tokenised"
    assert np.mean(off) < 0.01 < np.mean(plain_off)
    assert np.mean(inside) >= 0.75


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.integers(1, 90))
def test_any_corpus_and_any_sample(sizes: list[int], wanted: int) -> None:
    characters = np.array(sizes)
    taken = choose(characters, wanted)
    assert len(set(taken.tolist())) == len(taken)
    found = estimate(characters, {int(i): sizes[i] * 2 for i in taken})
    assert found.lengths.tolist() == [2 * size for size in sizes], "a constant ratio is exact"
    assert found.tokenised == len(taken)


@pytest.fixture
def words(tmp_path: Path) -> FromFile:
    model = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    return FromFile.load(tmp_path)


def test_a_diagnosis_from_a_sample(tmp_path: Path, words: FromFile) -> None:
    random = np.random.default_rng(0)
    texts = ["ab " * int(size) for size in random.lognormal(4, 1, 600)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    exact = diagnose(path, tokenizer=words, max_length=512)
    found = diagnose(path, tokenizer=words, max_length=512, sample=100)
    assert exact.characters == found.characters == sum(map(len, texts))
    assert exact.tokenised == 600 and not exact.intervals
    assert found.tokenised < 170 and found.lengths.tokens == exact.lengths.tokens
    assert set(found.intervals) == {"tokens", "50", "90", "99", "99.9"}
    assert any("were tokenised" in str(part) for part in render(found).renderables)  # type: ignore[attr-defined]
