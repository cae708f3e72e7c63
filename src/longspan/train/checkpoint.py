"""Checkpoints that are whole or not there: written aside, hashed, then renamed.

A checkpoint is a folder ``step-00000100`` of safetensors files, one a rank, ``state.json`` with
all that isn't a tensor, and ``manifest.json`` with the sha256 of each, written last. It can be
read by any number of ranks.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from longspan.comm.agree import all_words, first_words
from longspan.errors import CheckpointError
from longspan.outer.sync import OuterSync
from longspan.train.manifest import MANIFEST, damage, sha256

__all__ = ["Progress", "load_newest", "save"]

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_State = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and packed sequences taken from the data."""

    step: int
    cursor: int


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    group: dist.ProcessGroup | None = None,
    outer: OuterSync | None = None,
) -> Path:
    """Write a checkpoint into ``folder`` on all ranks together, then drop all but ``keep``.

    group: the ranks of this site, if there are several sites; ``outer`` is what joins them.

    Raises CheckpointError, on every rank, if the disk won't take it; what was there is kept.
    """
    target = folder / f"step-{progress.step:08d}"
    aside = folder / f".{target.name}.partial"
    if target.exists():
        return target
    leader = dist.get_rank(group) == 0
    state, agreed = _outer_state(outer)
    with _together(f"couldn't write {target}", group):
        if leader:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    with _together(f"couldn't write {target}", group):
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        tensors = _tensors(model, *_states(model, optimizer), group) | agreed
        save_tensors(tensors, storage_writer=writer, process_group=group)
    with _together(f"couldn't write {target}", group):
        if leader:
            _write(aside / "state.json", asdict(progress) | state)
            _seal(aside)
            aside.replace(target)
            _fsync(folder)
            for old in _newest_first(folder)[keep:]:
                shutil.rmtree(old)
    return target


def load_newest(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
    outer: OuterSync | None = None,
) -> tuple[Progress | None, list[str]]:
    """Put the newest sound checkpoint into model and optimizer, on all ranks together.

    group: the ranks of this site, if there are several sites; all go on from the newest step
    that each of them has.

    Returns how far it is, None if there is no checkpoint at all, and what was refused and why.
    A damaged checkpoint is renamed to ``….damaged``. Raises CheckpointError, on every rank, if
    there are checkpoints and none is sound.
    """
    refused: list[str] = []
    found: Path | None = None
    step = -1
    if dist.get_rank(group) == 0:
        candidates = _newest_first(folder)
        for candidate in candidates:
            if not (wrong := damage(candidate)):
                found, step = candidate, _step(candidate)
                break
            refused.append(f"{candidate}: {wrong}")
            candidate.rename(candidate.with_name(candidate.name + ".damaged"))
        if candidates and not found:
            step = -2
    step = _from_leader(step, group)
    if outer:
        step = _of_all_sites(step, folder)
    if step == -2:
        reasons = first_words("; ".join(refused))
        raise CheckpointError(f"no checkpoint in {folder} is sound: {reasons}")
    if step == -1:
        return None, refused
    path = folder / f"step-{step:08d}"
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    agreed = state.pop("outer", None)
    _restore(path, model, optimizer, group, outer, agreed)
    return Progress(**state), refused


def _of_all_sites(step: int, folder: Path) -> int:
    """The newest step of which every site has a sound checkpoint; -1: none has any."""
    steps = [int(words) for words in all_words(str(step))]
    common = min(steps)
    if common < 0:
        return -1 if max(steps) == -1 else -2
    path = folder / f"step-{common:08d}"
    wrong = damage(path) if common != step else None
    if words := first_words(f"{path}: {wrong}" if wrong else ""):
        raise CheckpointError(f"the sites have no sound checkpoint of one step: {words}")
    return common


def _outer_state(outer: OuterSync | None) -> tuple[_State, dict[str, Tensor]]:
    """Plain values for ``state.json``, and tensors."""
    if outer is None:
        return {}, {}
    state = outer.state_dict()
    return {"outer": state.pop("progress")}, {f"outer.{n}": t for n, t in state.items()}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[_State, _State]:
    """Weights and optimizer state by name; the tensors are the live ones."""
    weights, moments = get_state_dict(model, optimizer, options=_FLAT)
    return dict(weights), dict(moments)


def _tensors(
    model: nn.Module, weights: _State, moments: _State, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """All that is stored as tensors; tied weights once."""
    once = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    tensors = {f"model.{name}": tensor for name, tensor in weights.items() if name in once}
    tensors |= {f"optimizer.{n}": value for n, value in moments.items() if torch.is_tensor(value)}
    tensors[f"rng.cpu.{dist.get_rank(group)}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"rng.cuda.{dist.get_rank(group)}"] = torch.cuda.get_rng_state()
    return tensors


def _restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None,
    outer: OuterSync | None,
    agreed: _State | None,
) -> None:
    weights, moments = _states(model, optimizer)
    tensors = _tensors(model, weights, moments, group)
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    # A rank that wasn't there when the checkpoint was written has no generator state in it.
    tensors = {name: t for name, t in tensors.items() if name in stored or "rng." not in name}
    if outer and agreed:
        sizes = {n.removeprefix("outer."): m for n, m in stored.items() if n.startswith("outer.")}
        whole: dict[str, Sequence[int]] = {
            n: m.size for n, m in sizes.items() if isinstance(m, TensorStorageMetadata)
        }
        places = outer.places(whole)
        tensors |= {f"outer.{name}": tensor for name, tensor in places.items()}
    load(tensors, storage_reader=reader, process_group=group)
    if outer and agreed:
        outer.load_state_dict(_under(tensors, "outer.") | {"progress": agreed})
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights | _under(tensors, "model."),
        optim_state_dict=moments | _under(tensors, "optimizer."),
        options=_FLAT,
    )
    if (state := tensors.get(f"rng.cpu.{dist.get_rank(group)}")) is not None:
        torch.set_rng_state(state)
    if (state := tensors.get(f"rng.cuda.{dist.get_rank(group)}")) is not None:
        torch.cuda.set_rng_state(state)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _seal(folder: Path) -> None:
    """Make every file durable, then say in a manifest what each must be."""
    hashes = {}
    for file in _files(folder):
        _fsync(file)
        hashes[file.name] = sha256(file)
    _write(folder / MANIFEST, {"sha256": hashes})
    _fsync(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file())


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    _fsync(file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _together(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise CheckpointError on every rank of the group if the work inside fails on any."""
    failure = ""
    try:
        yield
    except OSError as error:
        failure = str(error)
    except CheckpointException as error:
        failure = "; ".join(str(cause) for cause, _ in error.failures.values())
    if failure := first_words(failure, group):
        raise CheckpointError(f"{what}: {failure}")


def _from_leader(value: int, group: dist.ProcessGroup | None) -> int:
    shared = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(shared, group=group, group_src=0)
    return int(shared.item())
