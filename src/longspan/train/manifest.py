"""What a checkpoint's bytes must be: sha256 of each file, in ``manifest.json``."""

import hashlib
import json
from pathlib import Path

__all__ = ["MANIFEST", "damage", "run_of", "sha256"]

MANIFEST = "manifest.json"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every byte is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        hashes = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or can't be read"
    for name, expected in hashes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != expected:
            return f"{name} isn't what was written (sha256 differs)"
    return None


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote it; of several sites each has a folder of its own in it."""
    folder = checkpoint.parent
    return (folder if folder.name == "checkpoints" else folder.parent).parent


def sha256(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
