"""Checkpoints: whole or not there, read by any number of ranks, damage noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.errors import CheckpointError
from longspan.train.checkpoint import Progress, load_newest, save
from longspan.train.manifest import damage


def build(mesh: DeviceMesh, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """A sharded model with tied weights and dims that no number of ranks divides."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=30,
            intermediate_size=41,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=10,
            vocab_size=37,
            tie_word_embeddings=True,
        )
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(20)[None] + torch.randint(9, (1,))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "step")]
    tensors = [*model.parameters(), *moments]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def write_three(mesh: DeviceMesh, folder: Path) -> list[torch.Tensor]:
    """Three steps, each saved, two kept; then a fourth step, for what should come back."""
    model, optimizer = build(mesh, 0)
    torch.manual_seed(dist.get_rank())
    for number in (1, 2, 3):
        step(model, optimizer)
        path = save(folder, model, optimizer, Progress(number, 10 * number), keep=2)
        assert path.name == f"step-{number:08d}"
    assert save(folder, model, optimizer, Progress(3, 30), keep=2) == path
    step(model, optimizer)
    return whole(model, optimizer)


def read(mesh: DeviceMesh, folder: Path, then_step: bool) -> tuple[Any, list[str], Any]:
    model, optimizer = build(mesh, 1)
    progress, refused = load_newest(folder, model, optimizer)
    if then_step:
        step(model, optimizer)
    return progress, refused, whole(model, optimizer)


def test_a_run_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(write_three, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert len(list((tmp_path / "step-00000003").glob("*.safetensors"))) == 4
    found = ranks.run(read, tmp_path, True)
    for (progress, refused, tensors), wanted in zip(found, expected, strict=True):
        assert progress == Progress(3, 30) and refused == []
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def write_one(mesh: DeviceMesh, folder: Path) -> list[torch.Tensor]:
    model, optimizer = build(mesh, 0)
    step(model, optimizer)
    save(folder, model, optimizer, Progress(1, 1), keep=2)
    return whole(model, optimizer)


def test_written_by_four_read_by_all_four_in_another_layout(ranks: Ranks, tmp_path: Path) -> None:
    """A mesh of two rows of two shards differently from one of four."""
    (expected, *_) = ranks.run(write_one, tmp_path)
    for _, _, tensors in ranks.run(read_hybrid, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def read_hybrid(mesh: DeviceMesh, folder: Path) -> Any:
    hybrid = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "shard"))
    return read(hybrid, folder, False)


def flip_bit(file: Path, byte: int = -100) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(write_three, tmp_path)
    newest = tmp_path / "step-00000003"
    victim = sorted(newest.glob("*.safetensors"))[1]
    flip_bit(victim)
    for rank, (progress, refused, _) in enumerate(ranks.run(read, tmp_path, False)):
        assert progress == Progress(2, 20)
        if rank == 0:
            (words,) = refused
            assert f"{newest}: {victim.name} isn't what was written" in words
    assert (tmp_path / "step-00000003.damaged").is_dir() and not newest.exists()


def read_refused(mesh: DeviceMesh, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_newest(folder, *build(mesh, 1))
    return str(caught.value)


def test_never_from_the_start_over_damaged_checkpoints(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(write_one, tmp_path)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    message, *_ = ranks.run(read_refused, tmp_path)
    assert "manifest.json is missing" in message


def test_no_checkpoint_is_no_error(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.partial").mkdir()
    for progress, refused, _ in ranks.run(read_untrained, tmp_path):
        assert progress is None and refused == []


def read_untrained(mesh: DeviceMesh, folder: Path) -> tuple[Any, list[str], None]:
    return (*load_newest(folder, *build(mesh, 1)), None)


def test_what_damage_says(tmp_path: Path) -> None:
    assert "manifest.json is missing" in str(damage(tmp_path))
    (tmp_path / "manifest.json").write_text('{"sha256": {"a.safetensors": "0"}}')
    assert damage(tmp_path) == "a.safetensors is missing"


def unwritable(mesh: DeviceMesh, folder: Path) -> str:
    model, optimizer = build(mesh, 0)
    step(model, optimizer)
    with pytest.raises(CheckpointError) as caught:
        save(folder, model, optimizer, Progress(1, 1), keep=2)
    return str(caught.value)


def test_a_disk_that_takes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in ranks.run(unwritable, tmp_path / "file"):
        assert "couldn't write" in message and "\n" not in message
