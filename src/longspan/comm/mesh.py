"""Meshes of ranks, and the process group they stand on."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan.errors import ConfigError, LayoutError

__all__ = ["axis_group", "connect", "flat_group", "make_mesh", "sharding_mesh"]


def connect(timeout_s: float = 300.0) -> torch.device:
    """Join the process group that torchrun's environment describes; returns this rank's device.

    NCCL where every local rank has a GPU of its own, else Gloo. Raises ConfigError where there
    are GPUs, but fewer than local ranks.
    """
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() < local_world:
            raise ConfigError(
                f"{local_world} processes on a node with {torch.cuda.device_count()} GPUs: "
                "start one process a GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


def make_mesh(world: int, sp: int, device_type: str) -> DeviceMesh:
    """A mesh with axes ``dp`` and ``sp``: sequences are sharded over the ``sp`` ranks of a row.

    Raises ConfigError if ``sp`` doesn't divide ``world``.
    """
    if sp < 1 or world % sp:
        raise ConfigError(
            f"parallel.sp is {sp}, which doesn't divide {world} processes: "
            f"use one of {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
        )
    return init_device_mesh(device_type, (world // sp, sp), mesh_dim_names=("dp", "sp"))


def sharding_mesh(shards: int, device_type: str) -> DeviceMesh:
    """A mesh for parameters that are spread over every ``shards`` ranks, side by side.

    One axis if these are all ranks; else ``replica`` and ``shard``, as FSDP2 wants them. Raises
    ConfigError if ``shards`` doesn't divide the ranks.
    """
    world = dist.get_world_size()
    if shards < 1 or world % shards:
        raise ConfigError(
            f"parameters can't be spread over {shards} ranks each of {world}: nodes must be alike, "
            "or set parallel.sharding to world or none"
        )
    if shards == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    shape = (world // shards, shards)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replica", "shard"))


def axis_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of a mesh of one axis; LayoutError for a mesh of several."""
    if mesh.ndim != 1:
        axes = ", ".join(mesh.mesh_dim_names or map(str, range(mesh.ndim)))
        raise LayoutError(f"a mesh of one axis is needed, this one has {axes}: pass mesh['sp']")
    return mesh.get_group()


def flat_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of all ranks of a mesh of one axis or two; LayoutError for more axes."""
    if mesh.ndim == 2:
        return mesh._flatten().get_group()
    return axis_group(mesh)
