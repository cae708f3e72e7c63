"""The cheapest choice for every layer as a mixed integer program, which HiGHS solves.

A choice is a 0-1 variable. An edge that isn't the sum of two parts, one for either end, has a
variable for each pair of choices, and these add up to the choices at both its ends (the local
polytope; Alpa, arXiv 2201.12023, section 4.2, has the same program).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np
from numpy.typing import NDArray

from longspan.planner.eliminate import Floats

__all__ = ["cheapest_of"]

_Bools = NDArray[np.bool_]


def cheapest_of(
    costs: Sequence[Floats],
    pairs: Mapping[tuple[int, int], Floats],
    *,
    allowed: Sequence[_Bools] | None = None,
    held: Sequence[Floats] | None = None,
    limit: float = np.inf,
    scale: float | None = None,
    seconds: float = 60.0,
) -> tuple[list[int] | None, float]:
    """The cheapest places in the flattened ``costs`` (choices, options), and a lower bound.

    ``pairs`` (u, v): (u's choices, v's choices). Only what is ``allowed`` is chosen; ``held`` adds
    up to at most ``limit``. ``scale``: a difference in cost that matters much. (None, inf) if
    nothing is possible, (None, bound) if nothing was found in ``seconds``.
    """
    program = _Program(costs, pairs, allowed)
    if program.dead:
        return None, np.inf
    if held is not None:
        program.limit_memory(held, limit)
    unit = scale or max(1e-300, max(float(np.abs(one).max()) for one in program.own))
    bans: list[list[int]] = []
    while True:
        flat, bound = program.run(unit, bans, seconds)
        if flat is None or held is None:
            return flat, bound
        if sum(float(one.flat[at]) for at, one in zip(flat, held, strict=True)) <= limit:
            return flat, bound
        bans.append(program.columns_of(flat))  # it fits but for HiGHS' tolerance


@dataclass
class _Rows:
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(
        self, lower: float, upper: float, columns: Sequence[int], values: Sequence[float]
    ) -> None:
        self.lower.append(lower)
        self.upper.append(upper)
        self.starts.append(len(self.columns))
        self.columns.extend(columns)
        self.values.extend(values)


class _Program:
    def __init__(
        self,
        costs: Sequence[Floats],
        pairs: Mapping[tuple[int, int], Floats],
        allowed: Sequence[_Bools] | None,
    ) -> None:
        ok = [np.isfinite(one) for one in costs]
        if allowed is not None:
            ok = [a & b for a, b in zip(ok, allowed, strict=True)]
        pairs = dict(pairs)
        self._drop_dead(ok, pairs)
        self.shapes = [one.shape for one in costs]
        self.dead = any(not one.any() for one in ok)
        if self.dead:
            return
        self.kept = [np.flatnonzero(one) for one in ok]
        states = [np.flatnonzero(one.any(axis=1)) for one in ok]
        self.own = [np.where(one_ok, one, 0.0) for one, one_ok in zip(costs, ok, strict=True)]
        self.offset = 0.0
        residuals = {}
        for (u, v), table in pairs.items():
            cut = table[np.ix_(states[u], states[v])]
            # As much as can be goes to the ends; most often nothing is left.
            rows = cut.min(axis=1)
            rest = cut - rows[:, None]
            columns = rest.min(axis=0)
            rest = rest - columns[None, :]
            self.own[u][states[u]] += rows[:, None]
            self.own[v][states[v]] += columns[:, None]
            if rest.any():
                residuals[u, v] = rest
        self.first = np.cumsum([0] + [len(one) for one in self.kept])
        self.binaries = int(self.first[-1])
        own = [one.flat[kept] for one, kept in zip(self.own, self.kept, strict=True)]
        for one in own:
            low = one.min()
            self.offset += float(low)
            one -= low
        self.costs = list(np.concatenate(own))
        self.upper = [1.0] * self.binaries
        self.rows = _Rows()
        for v in range(len(costs)):
            columns = range(self.first[v], self.first[v + 1])
            self.rows.add(1.0, 1.0, columns, [1.0] * len(columns))
        for (u, v), rest in residuals.items():
            self._join(u, v, rest, states)

    @staticmethod
    def _drop_dead(ok: list[_Bools], pairs: Mapping[tuple[int, int], Floats]) -> None:
        """A choice that no allowed choice of a neighbour goes with is none."""
        changed = True
        while changed:
            changed = False
            for (u, v), table in pairs.items():
                fine: _Bools = np.asarray(np.isfinite(table))
                for at, other, walls in ((u, v, fine), (v, u, fine.T)):
                    alive: _Bools = np.asarray(walls[:, ok[other].any(axis=1)].any(axis=1))
                    lost = ok[at] & ~alive[:, None]
                    if lost.any():
                        ok[at] = ok[at] & alive[:, None]
                        changed = True

    def _choice(self, v: int, state: int) -> list[int]:
        """The columns of one choice with any of its options."""
        options = self.shapes[v][1]
        at = np.flatnonzero(self.kept[v] // options == state)
        return [int(self.first[v] + place) for place in at]

    def _join(self, u: int, v: int, rest: Floats, states: Sequence[NDArray[np.int64]]) -> None:
        start = len(self.costs)
        self.costs.extend(np.where(np.isfinite(rest), rest, 0.0).ravel())
        self.upper.extend(np.where(np.isfinite(rest), 1.0, 0.0).ravel())
        places = start + np.arange(rest.size).reshape(rest.shape)
        for end, lines in ((u, places), (v, places.T)):
            for state, line in zip(states[end], lines, strict=True):
                chosen = self._choice(end, int(state))
                ones = [1.0] * len(line) + [-1.0] * len(chosen)
                self.rows.add(0.0, 0.0, [*map(int, line), *chosen], ones)

    def limit_memory(self, held: Sequence[Floats], limit: float) -> None:
        """What is held adds up to at most ``limit``."""
        least = [float(one.flat[kept].min()) for one, kept in zip(held, self.kept, strict=True)]
        room = limit - sum(least)
        unit = max(abs(room), 1e-12 * abs(limit), 1e-300)
        weights = [
            (one.flat[kept] - low) / unit
            for one, kept, low in zip(held, self.kept, least, strict=True)
        ]
        row = np.concatenate(weights)
        used = np.flatnonzero(row)
        self.rows.add(-np.inf, room / unit, [int(c) for c in used], [float(row[c]) for c in used])

    def columns_of(self, flat: Sequence[int]) -> list[int]:
        """The columns that are 1 in an assignment."""
        return [int(self.first[v] + np.searchsorted(self.kept[v], at)) for v, at in enumerate(flat)]

    def run(
        self, unit: float, bans: Sequence[Sequence[int]], seconds: float
    ) -> tuple[list[int] | None, float]:
        """The best assignment that isn't banned, and a lower bound of what is left."""
        rows = _Rows(*(list(getattr(self.rows, name)) for name in self.rows.__dataclass_fields__))
        for ban in bans:
            rows.add(-np.inf, len(ban) - 1.0, ban, [1.0] * len(ban))
        count = len(self.costs)
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = count, len(rows.lower)
        model.col_cost_ = np.asarray(self.costs) / unit
        model.col_lower_, model.col_upper_ = np.zeros(count), np.asarray(self.upper)
        model.row_lower_, model.row_upper_ = np.asarray(rows.lower), np.asarray(rows.upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.asarray([*rows.starts, len(rows.columns)])
        model.a_matrix_.index_ = np.asarray(rows.columns)
        model.a_matrix_.value_ = np.asarray(rows.values, dtype=np.float64)
        kinds = highspy.HighsVarType
        model.integrality_ = [kinds.kInteger] * self.binaries + [kinds.kContinuous] * (
            count - self.binaries
        )
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_abs_gap", 1e-7)
        solver.setOptionValue("mip_feasibility_tolerance", 1e-9)
        solver.setOptionValue("time_limit", seconds)
        solver.passModel(model)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None, np.inf
        bound = self.offset + unit * info.mip_dual_bound
        values = np.asarray(solver.getSolution().col_value)
        if info.primal_solution_status != 2 or not len(values):
            return None, bound
        flat = [
            int(kept[np.argmax(values[start : start + len(kept)])])
            for kept, start in zip(self.kept, self.first, strict=False)
        ]
        return flat, bound
