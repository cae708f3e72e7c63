"""Meshes of ranks, and the process group they stand on."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan.errors import ConfigError, LayoutError

__all__ = [
    "axis_group",
    "connect",
    "flat_group",
    "make_mesh",
    "new_axis_group",
    "ranks_of_a_site",
    "sharding_mesh",
    "site_group",
    "site_mesh",
]


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


def make_mesh(world: int, sp: int | None, device_type: str, sites: int = 1) -> DeviceMesh:
    """A mesh with axes ``dp`` and ``sp``: sequences are sharded over the ``sp`` ranks of a row.

    Several sites are a third axis, ``replica``, the first; without ``sp``, all ranks of a site
    share a sequence. Raises ConfigError if the sites don't divide ``world``, or ``sp`` a site.
    """
    inside = ranks_of_a_site(world, sp, sites)
    shape: tuple[int, ...] = (inside // (sp or inside), sp or inside)
    names: tuple[str, ...] = ("dp", "sp")
    if sites > 1:
        shape, names = (sites, *shape), ("replica", *names)
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def ranks_of_a_site(world: int, sp: int | None, sites: int) -> int:
    """How many of ``world`` ranks a site has; ConfigError as of ``make_mesh``."""
    if sites < 1 or world % sites:
        raise ConfigError(f"outer.sites is {sites}, which doesn't divide {world} processes")
    inside = world // sites
    if sp is not None and (sp < 1 or inside % sp):
        where = f" of each of {sites} sites" if sites > 1 else ""
        raise ConfigError(
            f"parallel.sp is {sp}, which doesn't divide {inside} processes{where}: "
            f"use one of {', '.join(str(n) for n in range(1, inside + 1) if inside % n == 0)}"
        )
    return inside


def new_axis_group(mesh: DeviceMesh, axis: str, timeout_s: float) -> dist.ProcessGroup:
    """A Gloo group of its own, along an axis, for what must not wait behind other collectives.

    All ranks of the mesh must call it.
    """
    place = (mesh.mesh_dim_names or ()).index(axis)
    rows = mesh.mesh.movedim(place, -1).reshape(-1, mesh.shape[place]).tolist()
    wait = timedelta(seconds=timeout_s)
    groups = [dist.new_group(row, timeout=wait, backend="gloo") for row in rows]
    (own,) = (group for row, group in zip(rows, groups, strict=True) if dist.get_rank() in row)
    assert isinstance(own, dist.ProcessGroup)
    return own


def site_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of all ranks of this rank's site, of a mesh of ``make_mesh``."""
    return site_mesh(mesh).get_group()


def site_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of this rank's site, on one axis."""
    return mesh["dp", "sp"]._flatten("site")


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
