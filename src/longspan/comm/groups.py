"""Meshes of any ranks, for plans that regroup them from batch to batch (FlexSP, arXiv 2412.01523).

Process groups are numbered by the order in which a process makes them, so all ranks go through all
sets of ranks in the same order, also those that they aren't in: a rank outside only counts. Members
meet one set after another, so sets that overlap can't wait for each other in a circle. (torch's
``use_local_synchronization`` names a group by how many groups this rank has, which ranks in
different sets don't agree on: they would wait forever.)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan.errors import LayoutError

__all__ = ["Groups"]


class Groups:
    """Meshes of one axis, ``sp``, over sets of ranks: made when first asked for, and kept.

    At most ``most`` sets are kept beside the world and single ranks, those used last, unless one
    call asks for more. A silent peer is waited for ``timeout_s``. To be made on all ranks, when the
    world's process group stands.
    """

    def __init__(self, device_type: str, most: int = 64, timeout_s: float = 300.0) -> None:
        self._device_type, self._most = device_type, most
        self._timeout = timedelta(seconds=timeout_s)
        self._here, self._world = dist.get_rank(), dist.get_world_size()
        everyone = tuple(range(self._world))
        self._always: dict[tuple[int, ...], dist.ProcessGroup | None] = {
            (rank,): self._make((rank,)) for rank in everyone
        }
        self._always[everyone] = dist.group.WORLD
        self._kept: OrderedDict[tuple[int, ...], dist.ProcessGroup | None] = OrderedDict()
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}

    @property
    def alone(self) -> DeviceMesh:
        """The mesh of this rank only."""
        return self._mesh((self._here,))

    def meshes(self, sets: Iterable[Sequence[int]]) -> list[DeviceMesh | None]:
        """The mesh of each set of ranks, None for those that this rank isn't in.

        All ranks must ask for the same sets in the same order. Raises LayoutError for a set that
        isn't ascending ranks of the world.
        """
        wanted = [tuple(ranks) for ranks in sets]
        for ranks in wanted:
            self._get(ranks)
        in_use = set(wanted)
        spare = [ranks for ranks in self._kept if ranks not in in_use]
        spare = spare[: max(0, len(self._kept) - self._most)]
        if spare:
            dist.barrier()  # a slower rank may still be in its last exchange there
        for ranks in spare:
            self._forget(ranks)
        return [self._mesh(ranks) if self._here in ranks else None for ranks in wanted]

    def close(self) -> None:
        """Forget all sets that aren't always kept."""
        for ranks in list(self._kept):
            self._forget(ranks)

    def _get(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        if ranks in self._always:
            return self._always[ranks]
        if ranks in self._kept:
            self._kept.move_to_end(ranks)
        else:
            if list(ranks) != sorted(set(ranks)) or not set(ranks) <= set(range(self._world)):
                raise LayoutError(
                    f"a group of ranks {', '.join(map(str, ranks))}: give some of 0 to "
                    f"{self._world - 1}, each once, ascending"
                )
            self._kept[ranks] = self._make(ranks)
        return self._kept[ranks]

    def _make(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        group = dist.new_group(list(ranks), timeout=self._timeout)
        return group if self._here in ranks else None

    def _mesh(self, ranks: tuple[int, ...]) -> DeviceMesh:
        if ranks not in self._meshes:
            group = self._get(ranks)
            assert group is not None, "a mesh is for its own ranks"
            self._meshes[ranks] = DeviceMesh.from_group(
                group, self._device_type, mesh_dim_names=("sp",)
            )
        return self._meshes[ranks]

    def _forget(self, ranks: tuple[int, ...]) -> None:
        self._meshes.pop(ranks, None)
        if group := self._kept.pop(ranks):
            dist.destroy_process_group(group)
