"""Tokenise once, read at random: documents as token ids in a memory-mapped file.

A store is a directory of ``tokens.bin`` (uint16, or uint32 for large vocabularies; documents end
to end, each with its end token), ``offsets.npy`` (int64, where each document starts, and the end
of the last) and ``about.json``.
"""

import fcntl
import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longspan.data.documents import batched, find_files, read_documents
from longspan.data.tokens import Tokenizer
from longspan.errors import DataError

__all__ = ["Store", "prepare"]

# Changes whenever the files of a store would: older ones are then built anew.
_FORMAT = 1


class Store:
    """Tokenised documents, read by memory map; ``key`` names their content.

    ``lengths``: int64 of shape (documents,), tokens of each document without its end token.
    """

    def __init__(self, directory: Path) -> None:
        """Open a store; raises DataError if it is damaged."""
        try:
            about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
            self._offsets = np.load(directory / "offsets.npy", mmap_mode="r")
            self._tokens = np.memmap(directory / "tokens.bin", np.dtype(about["dtype"]), "r")
            sound = self._offsets[-1] == self._tokens.size == about["tokens"]
            sound = sound and len(self._offsets) == about["documents"] + 1
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            sound = False
        if not sound:
            raise DataError(f"the token cache {directory} is damaged: delete it and start again")
        self.directory = directory
        self.key = directory.name
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets) - 1

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Tokens ``start`` to ``stop`` of a document of n tokens and, at n, its end token.

        int64 of shape (stop - start,); raises IndexError outside 0 … n + 1.
        """
        size = int(self.lengths[index]) + 1
        stop = size if stop is None else stop
        if index < 0 or not 0 <= start <= stop <= size:
            raise IndexError(f"document {index} has {size} tokens, not {start} to {stop}")
        first = int(self._offsets[index])
        return self._tokens[first + start : first + stop].astype(np.int64)


def prepare(path: Path, field: str, tokenizer: Tokenizer, cache_dir: Path) -> Store:
    """The documents at ``path`` as a store in ``cache_dir``, tokenised unless they already are.

    The key is made of the files' names, sizes and times of change, ``field`` and the tokenizer.
    Processes that call this at once wait for the one that builds. Raises DataError for
    documents that can't be read, or a cache that can't be written.
    """
    key = _key(path, field, tokenizer)
    directory, partial = cache_dir / key, cache_dir / f"{key}.partial"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{key}.lock"):
            try:
                return Store(directory)
            except DataError:
                # Missing, or torn when the machine went down.
                shutil.rmtree(directory, ignore_errors=True)
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _build(path, field, tokenizer, partial)
                partial.replace(directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return Store(directory)
    except OSError as error:
        raise DataError(
            f"can't keep tokens in {cache_dir} ({error.strerror or error}): "
            "give a directory with room that may be written"
        ) from None


def _key(path: Path, field: str, tokenizer: Tokenizer) -> str:
    about: list[object] = [_FORMAT, field, tokenizer.identity]
    for file in find_files(path):
        status = file.stat()
        name = file.relative_to(path) if file != path else file.name
        about.append([str(name), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock file stays: to remove it would let two processes hold a lock each. The kernel
    # frees the lock of a process that dies.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(path: Path, field: str, tokenizer: Tokenizer, directory: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    end = np.array([tokenizer.end_id], dtype)
    offsets = array("q", [0])
    with (directory / "tokens.bin").open("wb") as file:
        for texts in batched(read_documents(path, field)):
            for ids in tokenizer.encode_many(texts):
                file.write(ids.astype(dtype).data)
                file.write(end.data)
                offsets.append(offsets[-1] + len(ids) + 1)
    np.save(directory / "offsets.npy", np.frombuffer(offsets, np.int64))
    about = {
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
    }
    (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
