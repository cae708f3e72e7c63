"""The commands ``longspan verify`` and ``longspan export``."""

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.verdict import ADVICE, BLOCKED, FINE, Verdict, answer
from longspan.errors import CheckpointError

__all__ = ["export", "newest", "verify"]

Source = Annotated[Path, typer.Argument(help="A run's folder, or one checkpoint step-… of it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def verify(checkpoint: Source, as_json: AsJson = False) -> None:
    """Read every byte of a run's checkpoints, and say which are as they were written.

    Ends with 0 if all are, 1 if the newest isn't but an older one is, 2 if none is.
    """
    from rich.table import Table

    from longspan.train.manifest import damage, run_of

    found = _checkpoints(checkpoint)
    faults = {path: damage(path) for path in found}
    sound = [path for path, fault in faults.items() if fault is None]
    table = Table("checkpoint", "bytes", "state", box=None, pad_edge=False, header_style="dim")
    for path, fault in faults.items():
        table.add_row(_name(path), f"{_size(path):,}", fault or "sound")
    lines = (
        f"{len(sound)} of {len(found)} checkpoints are byte for byte what was written.",
        f"The newest sound one is {_name(sound[0])}." if sound else "None can be gone on from.",
        "A run goes on from the newest sound one by itself."
        if sound
        else "Restore the folder from a copy, or start anew.",
    )
    code = FINE if len(sound) == len(found) else ADVICE if sound else BLOCKED
    config = run_of(found[0]) / "config.yaml"
    command = f"longspan export {sound[0]} model/" if sound else f"longspan train {config}"
    values = {
        "checkpoints": [
            {"path": str(path), "bytes": _size(path), "fault": fault}
            for path, fault in faults.items()
        ]
    }
    answer(Verdict(lines, code, command), values, table, as_json)


def export(
    checkpoint: Source,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's weights as a Hugging Face folder of safetensors.

    Of a run's folder, the newest sound checkpoint is taken; of several sites, their global
    parameters.
    """
    from rich.table import Table

    from longspan.train.export import export as write

    source = newest(checkpoint)
    parameters = write(source, out)
    table = Table("file", "bytes", box=None, pad_edge=False, header_style="dim")
    files = sorted(out.iterdir())
    for file in files:
        table.add_row(file.name, f"{file.stat().st_size:,}")
    lines = (
        f"{_name(source)} is in {out}: {parameters:,} parameters.",
        "Every byte of the checkpoint was checked first.",
        "transformers, vLLM and others read this folder as it is.",
    )
    load = (
        f"python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('{out}')\""
    )
    values = {"checkpoint": str(source), "files": [str(file) for file in files]}
    answer(Verdict(lines, FINE, load), values, table, as_json)


def newest(path: Path) -> Path:
    """The newest sound checkpoint of a run, or the checkpoint itself; CheckpointError if none."""
    from longspan.train.manifest import damage

    found = _checkpoints(path)
    for candidate in found:
        if len(found) == 1 or damage(candidate) is None:
            return candidate
    raise CheckpointError(f"no checkpoint in {path} is sound: restore one from a copy")


def _checkpoints(path: Path) -> list[Path]:
    """Newest first."""
    if path.name.startswith("step-") and path.is_dir():
        return [path]
    # Each site of a run has a folder of its own.
    found = [*path.glob("checkpoints/step-*[0-9]"), *path.glob("checkpoints/site*/step-*[0-9]")]
    found.sort(key=lambda one: (one.name, one), reverse=True)
    if not found:
        raise CheckpointError(
            f"no checkpoints in {path}: give a run's folder, such as runs/NAME, or a checkpoint"
        )
    return found


def _name(checkpoint: Path) -> str:
    folder = checkpoint.parent.name
    return checkpoint.name if folder == "checkpoints" else f"{folder}/{checkpoint.name}"


def _size(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())
