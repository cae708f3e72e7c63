"""Which dim is sharded in each stage of a model: the cheapest layouts of a chain or graph.

Dynamic sequence parallelism (DSP, arXiv 2403.10266) shards a dim that a stage doesn't mix, and
switches to another one, by one all-to-all, before a stage that does. Here the switches are placed:
each stage in each layout has a price, and so has each change of layout between two stages; the
cheapest way through all of them is found exactly (``solve``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import contains

import numpy as np

from longspan.cluster.spec import Cluster
from longspan.errors import ClusterError, ConfigError
from longspan.plan import StagePlan, StageRival, StageRow
from longspan.planner.eliminate import Floats
from longspan.planner.solve import solve
from longspan.planner.stage import Sharded, Stage
from longspan.planner.stage_price import Inside, Price, Pricer

__all__ = ["plan_stages"]

_Choice = tuple[Sharded, Inside]


def plan_stages(
    stages: Sequence[Stage],
    *,
    sequence: Sequence[str],
    cluster: Cluster,
    ranks: int | None = None,
    axes: Mapping[str, int] | None = None,
    outside: Sequence[str] | None = None,
    empty: bool = True,
) -> StagePlan:
    """The layouts that a chain or graph of stages takes the fewest seconds in, and how it mixes.

    ``sequence``: the dims that may be sharded. ``ranks``: the first so many of the cluster (all by
    default). ``axes``: the mesh; by default one axis "sp", and where a dim is shorter than that,
    meshes of two axes as well. ``outside``: the dims that may be sharded before the first stage
    and after the last one (all by default), in one and the same layout. ``empty``: whether ranks
    may be left with nothing. Forward and backward, without overlap of a move and a computation.

    Raises ConfigError for stages that don't fit together or can't run in any layout, ClusterError
    if there are fewer ranks.
    """
    world = cluster.ranks if ranks is None else ranks
    if not 1 <= world <= cluster.ranks:
        raise ClusterError(f"{world} ranks on a cluster of {cluster.ranks}: give 1 to all of them")
    _check(stages, sequence, outside)
    meshes = [dict(axes)] if axes else _meshes(stages, sequence, world)
    jobs = [_Job(stages, tuple(sequence), Pricer(cluster, mesh), empty) for mesh in meshes]
    ends = sequence if outside is None else outside
    found = [(*job.best(job.homes(ends)), job) for job in jobs if all(job.choices)]
    if not found:
        raise ConfigError(
            f"no layout of {', '.join(sequence)} suits all stages: allow empty ranks, or give "
            "the stages heads"
        )
    _, choices, home, job = min(found, key=lambda one: one[0])
    line = _Job(stages, tuple(sequence), Pricer(cluster, {"sp": world}), True)
    return job.plan(choices, home, tuple(line.rivals()) if world > 1 else ())


def _check(stages: Sequence[Stage], sequence: Sequence[str], outside: Sequence[str] | None) -> None:
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) < len(names):
        raise ConfigError("stages need names of their own, and there must be one at least")
    for dim in {*sequence, *(outside or ())}:
        if dim not in sequence or not any(dim in stage.sizes for stage in stages):
            raise ConfigError(f"{dim!r} is no dim of the stages that may be sharded")
    for place, stage in enumerate(stages):
        if later := [name for name in stage.after or () if name not in names[:place]]:
            raise ConfigError(
                f"stage {stage.name!r} comes after {later[0]!r}, which isn't before it"
            )


def _meshes(stages: Sequence[Stage], sequence: Sequence[str], world: int) -> list[dict[str, int]]:
    short = any(stage.sizes.get(dim, world) < world for stage in stages for dim in sequence)
    factors = [n for n in range(2, world) if world % n == 0] if short else []
    return [{"sp": world}] + [{"sp_inter": n, "sp_intra": world // n} for n in factors]


@dataclass(frozen=True)
class _Job:
    """Stages on one mesh."""

    stages: Sequence[Stage]
    sequence: tuple[str, ...]
    pricer: Pricer
    empty: bool

    @property
    def axes(self) -> Mapping[str, int]:
        return self.pricer.axes

    def homes(self, dims: Sequence[str]) -> Sequence[Sharded]:
        """Layouts outside the stages, those that shard most first."""
        found = product((*dims, None), repeat=len(self.axes))
        ends = {place for place in range(len(self.stages)) if -1 in self.before(place)}
        ends.update(self.leaving())
        fine = [one for one in found if all(self._fits(self.stages[at], one) for at in ends)]
        return sorted(fine, key=lambda one: one.count(None))

    def _fits(self, stage: Stage, sharded: Sharded) -> bool:
        ranks: dict[str, int] = {}
        for dim, size in zip(sharded, self.axes.values(), strict=True):
            if dim is not None:
                ranks[dim] = ranks.get(dim, 1) * size
        return all(
            dim in stage.sizes and (self.empty or stage.sizes[dim] >= size)
            for dim, size in ranks.items()
        )

    @cached_property
    def choices(self) -> list[list[_Choice]]:
        """All that each stage can run in."""
        return [self._choices(stage) for stage in self.stages]

    def _choices(self, stage: Stage) -> list[_Choice]:
        """A dim that a stage mixes may be sharded by one axis."""
        found: list[_Choice] = []
        for sharded in product((*self.sequence, None), repeat=len(self.axes)):
            mixing = [dim for dim in sharded if dim in stage.mixes]
            if not self._fits(stage, sharded):
                continue
            if not mixing:
                found.append((sharded, "nothing"))
            elif len(mixing) == 1 == len(stage.mixes) and stage.heads:
                found += [(sharded, "heads"), (sharded, "ring")]
        return found

    def before(self, place: int) -> tuple[int, ...]:
        """The stages whose results a stage takes; -1: what comes from outside."""
        after = self.stages[place].after
        if after is None:
            return (place - 1,)
        names = [stage.name for stage in self.stages]
        return tuple(names.index(name) for name in after) or (-1,)

    def leaving(self) -> list[int]:
        """The stages whose results nobody else takes."""
        taken = {other for place in range(len(self.stages)) for other in self.before(place)}
        return [place for place in range(len(self.stages)) if place not in taken]

    def inside_s(self, place: int, choice: _Choice) -> float:
        """Seconds of a stage by itself."""
        stage = self.stages[place]
        return self.pricer.compute_s(stage, *choice) + self.pricer.inside(stage, *choice).seconds

    def move(self, place: int, src: Sharded, dst: Sharded) -> Price:
        """Of the tensor that a stage takes, or from the stages' end (-1) back outside."""
        return self.pricer.move(self.stages[place], src, dst)

    def best(self, homes: Sequence[Sharded]) -> tuple[float, list[_Choice], Sharded]:
        """The least seconds, every stage's choice, and the layout outside."""
        outside = len(self.stages)  # the layout outside is chosen like a stage's
        known: dict[tuple[object, ...], Floats] = {}

        def kind(at: int) -> object:
            return None if at == outside else self.stages[at].kind

        def layouts(at: int) -> Sequence[Sharded]:
            return homes if at == outside else [sharded for sharded, _ in self.choices[at]]

        def edge(src: int, dst: int, place: int) -> tuple[int, int, Floats]:
            """Seconds that a stage's tensor moves for; alike stages share their table."""
            key = kind(src), kind(dst), kind(place)
            if key not in known:
                ways = layouts(dst)
                seconds = [[self.move(place, a, b).seconds for b in ways] for a in layouts(src)]
                known[key] = np.array(seconds)
            return src, dst, known[key]

        edges = [
            edge(outside if at < 0 else at, place, place)
            for place in range(outside)
            for at in self.before(place)
        ]
        edges += [edge(at, outside, at) for at in self.leaving()]
        own: dict[object, Floats] = {}
        for place in range(outside):
            if kind(place) not in own:
                alone = [self.inside_s(place, choice) for choice in self.choices[place]]
                own[kind(place)] = np.array(alone)
        costs = [own[kind(place)] for place in range(outside)] + [np.zeros(len(homes))]
        found = solve(costs, edges)
        *picked, home = found.assignment
        ways = [options[at] for options, at in zip(self.choices, picked, strict=True)]
        return found.cost, ways, homes[home]

    def _prices(
        self, choices: Sequence[_Choice], home: Sharded
    ) -> tuple[list[Price], list[Price], Price]:
        """Of each stage's moves and what is inside it, and of the way out."""
        moved, inside = [], []
        for place, (sharded, how) in enumerate(choices):
            sources = [home if at < 0 else choices[at][0] for at in self.before(place)]
            moved.append(sum((self.move(place, src, sharded) for src in sources), Price()))
            inside.append(self.pricer.inside(self.stages[place], sharded, how))
        left = (self.move(at, choices[at][0], home) for at in self.leaving())
        return moved, inside, sum(left, Price())

    def plan(
        self, choices: Sequence[_Choice], home: Sharded, rivals: tuple[StageRival, ...]
    ) -> StagePlan:
        """The plan that says so."""
        moved, inside, left = self._prices(choices, home)
        rows = []
        for place, (stage, (sharded, how)) in enumerate(zip(self.stages, choices, strict=True)):
            sources = [home if at < 0 else choices[at][0] for at in self.before(place)]
            row = StageRow(
                name=stage.name,
                sizes=dict(stage.sizes),
                mixes=stage.mixes,
                after=tuple(self.stages[at].name for at in self.before(place) if at >= 0),
                sharded=sharded,
                inside=how,
                arrives=tuple(dict.fromkeys(w for s in sources for w in self._words(s, sharded))),
                moved_bytes=moved[place].most_sent,
                inside_bytes=inside[place].most_sent,
                moved_s=moved[place].seconds,
                inside_s=inside[place].seconds,
                computed_s=self.pricer.compute_s(stage, sharded, how),
            )
            rows.append(row)
        out = (w for at in self.leaving() for w in self._words(choices[at][0], home))
        total = sum((*moved, *inside, left), Price())
        seconds = total.seconds + sum(row.computed_s for row in rows)
        return StagePlan(
            axes=dict(self.axes),
            outside=home,
            stages=tuple(rows),
            leaves=tuple(dict.fromkeys(out)),
            left_bytes=left.most_sent,
            left_s=left.seconds,
            seconds=seconds,
            sent_bytes=total.most_sent,
            rivals=rivals,
        )

    def _words(self, src: Sharded, dst: Sharded) -> Iterable[str]:
        """How each axis changes: a split, a gather or a switch."""
        for axis, before, after in zip(self.axes, src, dst, strict=True):
            if before != after:
                way = "split" if before is None else "gather" if after is None else "switch"
                yield f"{axis}: {way} {' to '.join(dim for dim in (before, after) if dim)}"

    def rivals(self) -> Iterable[StageRival]:
        """The known ways on a mesh of one axis, each with the dim that suits it best."""
        ways: dict[str, Callable[[Stage, str], _Choice]] = {
            "ulysses": lambda s, dim: ((dim,), "heads" if dim in s.mixes else "nothing"),
            "ring": lambda s, dim: ((dim,), "ring" if dim in s.mixes else "nothing"),
            "gather": lambda s, dim: ((None if dim in s.mixes else dim,), "nothing"),
        }
        for name, way in ways.items():
            plans = []
            for dim in self.sequence:
                choices = [way(stage, dim) for stage in self.stages]
                if all(map(contains, self.choices, choices)):
                    plans.append(self.plan(choices, (dim,), ()))
            if plans:
                best = min(plans, key=lambda plan: plan.seconds)
                yield StageRival(name, best.sent_bytes, best.seconds)
        found = []
        for dim in self.sequence:
            if all(dim in stage.sizes for stage in self.stages):
                sent = sum((self.pricer.megatron(stage, dim) for stage in self.stages), Price())
                world = max(self.axes.values())
                alone = (self.pricer.compute_s(s, (None,), "nothing") for s in self.stages)
                found.append((sent.seconds + sum(alone) / world, sent.most_sent))
        if found:
            seconds, most = min(found)
            yield StageRival("megatron", most, seconds)
