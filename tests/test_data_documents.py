"""Documents from every kind of file, and one clear line for every kind of trouble."""

import json
import os
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longspan.data.documents import batched, find_files, read_documents
from longspan.errors import DataError


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path: Path, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(path, field))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_directory_is_read_whole_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.md").write_text("two")
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "c.py").write_text("")
    write_lines(tmp_path / "d.jsonl", {"text": "four"}, {"text": "five"})
    pq.write_table(pa.table({"text": ["six"]}), tmp_path / "e.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("no")
    assert list(read_documents(tmp_path)) == ["one", "two", "", "four", "five", "six"]


def test_a_text_file_is_one_document_whatever_its_ending(tmp_path: Path) -> None:
    for name in ("a.txt", "README"):
        (tmp_path / name).write_bytes(b"caf\xe9\r\n")
        assert list(read_documents(tmp_path / name)) == ["caf�\r\n"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"body": "a\xc3\xa9"}\n\n{"body": null}\r\n{"body": "\\ud800"}\n{"body": ""}'
    )
    assert list(read_documents(path, "body")) == ["aé", "", "\ud800", ""]
    path.rename(tmp_path / "a.json")
    assert len(list(read_documents(tmp_path / "a.json", "body"))) == 4


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_parquet_in_many_row_groups(tmp_path: Path, kind: object) -> None:
    texts = [f"document {i} é" if i % 7 else None for i in range(500)]
    column = pa.array(texts)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pa.table({"id": range(500), "body": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert list(read_documents(tmp_path / "a.parquet", "body")) == [t or "" for t in texts]


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or directory: .*nowhere"):
        read_documents(tmp_path / "nowhere")


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "no documents in" in refusal(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "only .zip" in refusal(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "its files are empty" in refusal(tmp_path)
    assert "is not text" in refusal_of_binary(tmp_path)


def refusal_of_binary(folder: Path) -> str:
    (folder / "a.bin").write_bytes(b"\0" * 10)
    return refusal(folder / "a.bin")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "half', ":3: not valid JSON (Unterminated string starting at column 10)"),
        (b"[" * 100_000, ":3: not valid JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", ":3: not valid JSON"),
        (b'{"text": "\xff"}', ":3: not UTF-8"),
        (b"[1]", ":3: a list, not an object"),
        (b'{"body": "x", "id\\n": 1}', r":3: no field 'text'; the fields there are 'body', 'id\n'"),
        (b"{}", ":3: no field 'text'; there are no fields"),
        (b'{"text": 5}', ":3: field 'text' holds int, not text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    assert f"{path}{said}" in refusal(path)


def test_a_parquet_file_that_does_not_serve(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    assert "no column 'text'; the columns there are 'body', 'id'" in refusal(path)
    assert "column 'id' is int64, not text" in refusal(path, "id")
    path.write_bytes(path.read_bytes()[:40])
    assert "not a sound Parquet file" in refusal(path)
    path.write_bytes(b"")
    assert "not a sound Parquet file" in refusal(path)


def test_links_that_lead_in_circles_or_to_pipes_do_not_hang(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.txt").write_text("outside")
    (inside / "a.txt").write_text("a")
    (inside / "circle").symlink_to(inside)
    (inside / "out").symlink_to(tmp_path)
    (inside / "self.txt").symlink_to(inside / "self.txt")
    (inside / "gone.txt").symlink_to(tmp_path / "gone")
    (inside / "linked.txt").symlink_to(tmp_path / "outside.txt")
    os.mkfifo(inside / "pipe.txt")
    assert [file.name for file in find_files(inside)] == ["a.txt", "linked.txt"]
    assert list(read_documents(inside)) == ["a", "outside"]
    with pytest.raises(DataError, match="neither a file nor a directory"):
        read_documents(inside / "pipe.txt")


def test_reading_streams(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"text": "first"})
    write_lines(tmp_path / "b.jsonl", "broken")
    documents = read_documents(tmp_path)
    assert next(documents) == "first"
    with pytest.raises(DataError, match=r"b\.jsonl:1"):
        next(documents)


def test_batches_hold_every_document_and_no_more_than_they_may() -> None:
    texts = ["x" * size for size in (3, 4, 5, 0, 20, 1, 1)]
    batches = list(batched(texts, characters=8))
    assert list(chain(*batches)) == texts
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 8 for batch in batches)
    assert max(map(len, batched(["x"] * 3000))) == 1024
