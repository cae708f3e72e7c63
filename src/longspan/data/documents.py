"""Documents, one after the other, from text files, JSON lines and Parquet.

Nothing holds more than one document, or one batch of Parquet rows, in memory. The order is that
of the sorted paths, and inside a file that of its lines or rows: the same on every machine.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from longspan.errors import DataError

__all__ = ["batched", "find_files", "read_documents"]

_LINES = {".jsonl", ".ndjson"}
_PARQUET = {".parquet", ".pq"}
_TEXT = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".log"}
_TEXT |= {
    ".html",
    ".htm",
    ".xml",
    ".svg",
    ".css",
    ".yaml",
    ".yml",
    ".toml",
    ".ini",
    ".cfg",
    ".conf",
}
_TEXT |= {".py", ".pyi", ".r", ".jl", ".lua", ".pl", ".rb", ".php", ".sh", ".bat", ".ps1", ".sql"}
_TEXT |= {".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".cu", ".cuh", ".m", ".cs", ".java"}
_TEXT |= {".go", ".rs", ".zig", ".swift", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".vue"}
_TEXT |= {".hs", ".ml", ".lisp", ".clj", ".erl", ".ex", ".lean", ".f90"}
_SPLIT = "split it into documents of at most 256 MiB"
_MEND = "longspan reads text files (.txt, .md, .py, …), .jsonl and .parquet"
_BATCH_ROWS = 64
# One document is held whole, several times while it is decoded; more than this is a mistake.
_LARGEST_BYTES = 1 << 28


def find_files(path: Path) -> list[Path]:
    """The files under ``path`` that hold documents, sorted; ``path`` itself if it is a file.

    Directories are walked whole, save for hidden entries (``.git``) and links to directories,
    which might lead out or in circles. Raises DataError if there is nothing to read.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"no such file or directory: {path}; give the path of the documents")
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a directory; {_MEND}")
    found: list[Path] = []
    others: set[str] = set()
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            suffix = file.suffix.lower()
            # is_file() is false for pipes and devices, which would never end.
            if suffix in _TEXT | _LINES | _PARQUET and file.is_file():
                found.append(file)
            else:
                others.add(suffix or "no ending")
    if not found:
        kinds = f" it holds only {', '.join(sorted(others)[:8])};" if others else ""
        raise DataError(f"no documents in {path}:{kinds} {_MEND}")
    return sorted(found)


def read_documents(path: Path, field: str = "text") -> Iterator[str]:
    """The documents at ``path``: a directory, a text file, a ``.jsonl`` or a ``.parquet`` file.

    A text file is one document, undecodable bytes replaced; ``field`` names the JSON field or the
    Parquet column that holds a text, where null is an empty document. Raises DataError, at the
    call for a missing path or one without readable files, and while reading for a file, line
    or row that can't be used, or if there was no document at all.
    """
    return _read(path, find_files(path), field)


def batched(documents: Iterable[str], characters: int = 1 << 22) -> Iterator[list[str]]:
    """Documents in lists of at most 1024 and, unless one alone is longer, ``characters``."""
    batch: list[str] = []
    room = characters
    for text in documents:
        if batch and (len(text) > room or len(batch) == 1024):
            yield batch
            batch, room = [], characters
        batch.append(text)
        room -= len(text)
    if batch:
        yield batch


def _refuse(error: OSError) -> None:
    raise DataError(f"can't read {error.filename}: {error.strerror}; check its permissions")


def _read(path: Path, files: list[Path], field: str) -> Iterator[str]:
    empty = True
    for file in files:
        suffix = file.suffix.lower()
        try:
            if suffix in _PARQUET:
                documents = _parquet(file, field)
            # A lone .json is nearly always JSON lines by another name.
            elif suffix in _LINES or suffix == ".json":
                documents = _lines(file, field)
            else:
                documents = _text(file)
            for text in documents:
                empty = False
                yield text
        except OSError as error:
            raise DataError(f"can't read {file}: {error.strerror or _first_line(error)}") from None
    if empty:
        raise DataError(f"no documents in {path}: its files are empty; give others")


def _text(file: Path) -> Iterator[str]:
    if (size := file.stat().st_size) > _LARGEST_BYTES:
        raise DataError(f"{file} is one document of {size:,} bytes: {_SPLIT}")
    data = file.read_bytes()
    if file.suffix.lower() not in _TEXT and b"\0" in data[:8192]:
        raise DataError(f"{file} is not text; {_MEND}")
    yield data.decode("utf-8", errors="replace")


def _lines(file: Path, field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        bounded = iter(partial(lines.readline, _LARGEST_BYTES + 1), b"")
        for number, line in enumerate(bounded, start=1):
            where = f"{file}:{number}"
            if len(line) > _LARGEST_BYTES:
                raise DataError(f"{where}: a line of over {_LARGEST_BYTES:,} bytes; {_SPLIT}")
            if not (line := line.strip()):
                continue
            try:
                # utf-8-sig passes over the mark that some editors put first.
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 at byte {error.start}; convert it") from None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not valid JSON ({_json_fault(error)}); mend or delete the line"
                ) from None
            yield _text_of(row, field, where)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f"{where}: a {kind}, not an object; write one {{{field!r}: …}} a line")
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; {_there('fields', row)}")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{where}: field {field!r} holds {kind}, not text; name another field")
    return text


def _there(what: str, names: Iterable[str]) -> str:
    shown = [repr(name if len(name) <= 40 else name[:39] + "…") for name in names]
    if not shown:
        return f"there are no {what}"
    more = ", …" if len(shown) > 12 else ""
    return f"the {what} there are {', '.join(shown[:12])}{more}: name one of them"


def _parquet(file: Path, field: str) -> Iterator[str]:
    # Imported late: only those who have Parquet files should wait for it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise DataError(f"{file}: no column {field!r}; {_there('columns', schema.names)}")
            kind = schema.field(field).type
            plain = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(plain) or pa.types.is_large_string(plain)):
                raise DataError(f"{file}: column {field!r} is {kind}, not text; name another")
            for rows in table.iter_batches(_BATCH_ROWS, columns=[field]):
                # As bytes, because nothing promises that a writer's strings are UTF-8.
                column = rows.column(0).cast(plain).cast(pa.large_binary())
                for value in column:
                    yield (value.as_py() or b"").decode("utf-8", errors="replace")
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a sound Parquet file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
