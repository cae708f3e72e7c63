"""Real processes in a Gloo group, started once, that run a test's function on every rank."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

MOST = 4
TIDY = "tidy"
# What every process needs is imported once; the processes are forks of one that has done nothing.
SHARED = [
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "longspan.attention.attend",
    "longspan.comm.redistribute",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


def _serve(rank: int, size: int, port: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    meshes = {}
    for world in range(1, size + 1):
        group = dist.new_group(list(range(world)))
        if rank < world:
            meshes[world] = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("sp",))
    own = set(_groups())
    while (order := orders.recv()) is not None:
        if order == TIDY:
            for group in _groups():
                if group not in own:
                    dist.destroy_process_group(group)
            continue
        world, function, args = order
        try:
            orders.send((True, function(meshes[world], *args)))
        except BaseException:
            orders.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``run(f, *args, world=n)`` calls ``f(mesh, *args)`` on n ranks; f must be importable."""

    def __init__(self, size: int = MOST, preload: tuple[str, ...] = ()) -> None:
        """``preload``: modules that many processes are to have from one import, forked."""
        self._size, self._preload = size, preload
        self._start()

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([*SHARED, *self._preload])
        port = free_port()
        pipes = [context.Pipe() for _ in range(self._size)]
        self._orders = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, self._size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, world: int = MOST) -> list[Any]:
        orders = self._orders[:world]
        for order in orders:
            order.send((world, function, args))
        results: dict[int, Any] = {}
        while len(results) < world:
            ready = wait([o for i, o in enumerate(orders) if i not in results], timeout=120)
            if not ready:
                self.stop(kill=True)
                self._start()
                raise AssertionError(f"ranks {set(range(world)) - results.keys()} hang")
            for connection in ready:
                fine, value = connection.recv()  # type: ignore[union-attr]
                if not fine:
                    self.stop(kill=True)
                    self._start()
                    raise AssertionError(value)
                results[orders.index(connection)] = value  # type: ignore[arg-type]
        return [results[rank] for rank in range(world)]

    def tidy(self) -> None:
        """Close the groups that tests have made: an idle one's thread wakes 100 times a second."""
        for order in self._orders:
            order.send(TIDY)

    def stop(self, kill: bool = False) -> None:
        for order, process in zip(self._orders, self._processes, strict=True):
            if kill:
                process.kill()
            else:
                order.send(None)
        for process in self._processes:
            process.join()
