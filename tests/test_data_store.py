"""Tokens: bytes and tokenizer files; the store they are kept in."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, pre_tokenizers, trainers

from longspan.data.documents import read_documents
from longspan.data.store import Store, prepare
from longspan.data.tokens import Bytes, FromFile, load_tokenizer
from longspan.errors import ConfigError, DataError

TEXTS = ["alpha beta", "", "gamma é", "</s> <|endoftext|>", "\N{SNOWMAN}" * 50]


def trained(path: Path, specials: tuple[str, ...] = ("</s>",), truncate: bool = False) -> Path:
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    if truncate:
        model.enable_truncation(2)
        model.enable_padding(length=9)
    model.save(str(path))
    return path


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@settings(deadline=None)
@given(st.text())
def test_bytes_come_back_as_the_text(text: str) -> None:
    ids = Bytes().encode(text)
    assert ids.dtype == np.int64
    assert bytes(ids.astype(np.uint8)) == text.encode("utf-8", errors="replace")
    assert Bytes().count_many([text]) == [len(ids)]


def test_a_tokenizer_file_is_used_whole_and_adds_nothing(tmp_path: Path) -> None:
    path = trained(tmp_path / "tokenizer.json", truncate=True)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, FromFile)
    model = Model.from_file(str(path))
    assert tokenizer.end_id == model.token_to_id("</s>")
    assert tokenizer.vocab_size == model.get_vocab_size()
    for text, count in zip(TEXTS, tokenizer.count_many(TEXTS), strict=True):
        ids = tokenizer.encode(text)
        assert len(ids) == count
        assert tokenizer.model.decode(ids.tolist(), skip_special_tokens=False) == text


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained(tmp_path / "t.json"))
    assert tokenizer.end_id not in tokenizer.encode("one</s>two")
    assert len(tokenizer.encode("lone \ud800 surrogate")) > 0
    assert len(Bytes().encode("lone \ud800 surrogate")) == 16


def test_the_end_of_a_document_is_found_or_named(tmp_path: Path) -> None:
    both = trained(tmp_path / "both.json", ("</s>", "<|im_end|>", "<stop>"))
    found = [load_tokenizer(both, end).end_id for end in (None, "<|im_end|>", "<stop>")]
    assert found == [0, 1, 2]
    assert len({load_tokenizer(both, end).identity for end in (None, "<stop>")}) == 2
    with pytest.raises(ConfigError, match="no token '<halt>'"):
        load_tokenizer(both, "<halt>")
    with pytest.raises(ConfigError, match="none of the usual end-of-document tokens"):
        load_tokenizer(trained(tmp_path / "none.json", ("<stop>",)))
    with pytest.raises(ConfigError, match="bytes have no token"):
        load_tokenizer(None, "</s>")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 9999, b"\xff", b'{"model": {"type": 1}}'])
def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a tokenizer") as caught:
        load_tokenizer(tmp_path / "t.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "other.json")


def test_a_store_gives_back_every_document(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus")
    for tokenizer in (Bytes(), load_tokenizer(trained(tmp_path / "t.json"))):
        store = prepare(path, "text", tokenizer, tmp_path / "cache")
        assert store.lengths.dtype == np.int64
        assert store.lengths.tolist() == tokenizer.count_many(TEXTS)
        assert len(store) == len(TEXTS)
        for index, text in enumerate(read_documents(path)):
            expected = [*tokenizer.encode(text), tokenizer.end_id]
            whole = store.tokens(index)
            assert whole.dtype == np.int64
            assert whole.tolist() == expected
            assert store.tokens(index, 1, len(expected)).tolist() == expected[1:]
            with pytest.raises(IndexError):
                store.tokens(index, 0, len(expected) + 1)
    with pytest.raises(IndexError):
        store.tokens(-1)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide:
        name = identity = "wide"
        vocab_size, end_id = 70_001, 70_000

        def encode(self, text: str) -> np.ndarray:
            return np.full(len(text), 69_999)

        def encode_many(self, texts: list[str]) -> list[np.ndarray]:
            return [self.encode(text) for text in texts]

        def count_many(self, texts: list[str]) -> list[int]:
            return [len(text) for text in texts]

    store = prepare(corpus(tmp_path / "corpus"), "text", Wide(), tmp_path / "cache")
    assert store.tokens(2).tolist() == [69_999] * 7 + [70_000]


def test_a_store_is_built_once_and_again_when_something_changed(tmp_path: Path) -> None:
    path, cache = corpus(tmp_path / "corpus"), tmp_path / "cache"
    first = prepare(path, "text", Bytes(), cache)
    stamp = (first.directory / "tokens.bin").stat().st_mtime_ns
    again = prepare(path, "text", Bytes(), cache)
    assert (again.directory / "tokens.bin").stat().st_mtime_ns == stamp
    keys = {first.key, prepare(path, "body", Bytes(), cache).key}
    (path / "0.txt").write_text("more words")
    os.utime(path / "0.txt", ns=(0, 0))
    keys.add(prepare(path, "text", Bytes(), cache).key)
    (path / "0.txt").rename(path / "00.txt")
    keys.add(prepare(path, "text", Bytes(), cache).key)
    assert len(keys) == 4


def test_a_damaged_or_unfinished_store_is_built_anew(tmp_path: Path) -> None:
    path, cache = corpus(tmp_path / "corpus"), tmp_path / "cache"
    store = prepare(path, "text", Bytes(), cache)
    whole = [store.tokens(i).tolist() for i in range(len(store))]
    for name in ("tokens.bin", "offsets.npy", "about.json"):
        file = store.directory / name
        file.write_bytes(file.read_bytes()[:-2] if name != "about.json" else b"{}")
        with pytest.raises(DataError, match="damaged"):
            Store(store.directory)
        (cache / f"{store.key}.partial").mkdir()
        mended = prepare(path, "text", Bytes(), cache)
        assert [mended.tokens(i).tolist() for i in range(len(mended))] == whole
        assert not (cache / f"{store.key}.partial").exists()


def test_nothing_is_left_of_a_store_that_could_not_be_built(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare(tmp_path / "a.jsonl", "text", Bytes(), tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="can't keep tokens in"):
        prepare(corpus(tmp_path / "corpus"), "text", Bytes(), tmp_path / "file")


def _prepare(path: Path, cache: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    store = prepare(path, "text", Bytes(), cache)
    inode = (store.directory / "tokens.bin").stat().st_ino
    results.put((inode, store.lengths.tolist()))  # type: ignore[attr-defined]


def test_processes_that_prepare_at_once_share_one_store(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus")
    (path / "long.txt").write_text("some more words " * 100_000)
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    arguments = (path, tmp_path / "cache", barrier, results)
    workers = [spawn.Process(target=_prepare, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]


def test_the_room_needs_no_torch() -> None:
    code = (
        "import sys, longspan.data.render, longspan.data.diagnose, longspan.data.packing\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
