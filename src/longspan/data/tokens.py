"""Text to token ids: bytes by default, or any ``tokenizer.json``."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Model

from longspan.errors import ConfigError

__all__ = ["Bytes", "FromFile", "Tokenizer", "load_tokenizer"]

_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|return|>",
    "[EOS]",
    "[SEP]",
)


class Tokenizer(Protocol):
    """Turns a text into ids below ``vocab_size``; ``end_id`` closes a document.

    ``encode`` adds no token of its own. ``identity`` is the same for two tokenizers only if they
    give the same ids; ``name`` is "bytes" or the path of the file.
    """

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_id(self) -> int:
        """The id that is put after each document."""

    @property
    def identity(self) -> str:
        """What the ids depend on, for the keys of caches."""

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text: int64 of shape (tokens,)."""

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """The ids of each text."""

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has."""


@final
@dataclass(frozen=True)
class Bytes:
    """A token is a byte of the text in UTF-8 (ids 0 to 255); 256 ends a document."""

    name: str = field(default="bytes", init=False)
    vocab_size: int = field(default=257, init=False)
    end_id: int = field(default=256, init=False)
    identity: str = field(default="bytes", init=False)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text: int64 of shape (bytes,)."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """How many bytes each text has."""
        return [len(text) if text.isascii() else len(_utf8(text)) for text in texts]


@final
@dataclass(frozen=True)
class FromFile:
    """The tokenizer of a ``tokenizer.json``, with the name of the token that ends a document.

    Special tokens that are spelled out in a text are encoded as ordinary text where the model
    can, so no document can pass itself off as two. Truncation and padding that the file
    asks for are switched off.
    """

    name: str
    model: Model = field(repr=False)
    vocab_size: int
    end_id: int
    identity: str

    @classmethod
    def load(cls, path: Path, end: str | None = None) -> "FromFile":
        """Read ``path``: the file, or the directory it is in.

        Raises ConfigError if it is missing or broken, or its end-of-document token isn't known.
        """
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"no tokenizer at {path} ({error.strerror}): give a tokenizer.json, "
                "or leave it out to train on bytes"
            ) from None
        try:
            model = Model.from_buffer(data)
        except Exception as error:  # tokenizers raises the bare class
            what = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is not a tokenizer ({what}): give a tokenizer.json as the tokenizers "
                "library writes it"
            ) from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        ids = model.get_vocab(with_added_tokens=True)
        if not ids:
            raise ConfigError(f"{path} has an empty vocabulary: give a trained tokenizer")
        end_id = ids[_end_of(path, ids, end)]
        identity = f"{hashlib.sha256(data).hexdigest()}/{end_id}"
        return cls(str(path), model, max(ids.values()) + 1, end_id, identity)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text: int64 of shape (tokens,)."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """The ids of each text, encoded in parallel."""
        # Lone surrogates, which JSON can spell, are no Unicode text: they become "?".
        sound = [text if text.isascii() else _utf8(text).decode() for text in texts]
        found = self.model.encode_batch_fast(sound, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in found]

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has."""
        return [len(ids) for ids in self.encode_many(texts)]


def load_tokenizer(path: Path | None, end: str | None = None) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, or bytes for None.

    ``end`` names the token that ends a document; left out, the usual names are looked for.
    Raises ConfigError for a missing or broken file, or an end that the vocabulary lacks.
    """
    if path is not None:
        return FromFile.load(path, end)
    if end is not None:
        raise ConfigError(f"bytes have no token {end!r}: leave it out, or give a tokenizer.json")
    return Bytes()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _end_of(path: Path, ids: dict[str, int], end: str | None) -> str:
    if end is not None:
        if end not in ids:
            raise ConfigError(f"{path} has no token {end!r}: name one that ends a document")
        return end
    for name in _ENDS:
        if name in ids:
            return name
    raise ConfigError(
        f"{path} has none of the usual end-of-document tokens ({', '.join(_ENDS[:4])}, …): "
        "name its own"
    )
