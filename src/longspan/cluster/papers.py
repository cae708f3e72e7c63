"""Published tables beside what our simulator says of the same jobs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from longspan.cluster.bandwidth import paper_grid, required_bits_per_s
from longspan.schedule.outer import Method, OuterJob

__all__ = ["ComparedRow", "streaming_diloco"]


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One method and model: the Gbit/s needed for each share of time at work, paper and ours."""

    method: str
    model: str
    utilisations: tuple[float, ...]
    paper_gbit_per_s: tuple[float, ...]
    ours_gbit_per_s: tuple[float, ...]

    @property
    def steps_apart(self) -> list[int]:
        """Steps of the paper's grid from its point, which it rounds when printing it, to ours."""
        pairs = zip(self.paper_gbit_per_s, self.ours_gbit_per_s, strict=True)
        return [_nearest(ours) - _nearest(paper) for paper, ours in pairs]


def streaming_diloco() -> Iterator[ComparedRow]:
    """Table 4 of Streaming DiLoCo (arXiv 2501.18512), row by row as they are computed.

    H = 100, one step of delay where communication overlaps, 16 bits a parameter but for the last
    method.
    """
    utilisations = (0.5, 0.8, 0.9, 0.95, 0.99)
    models = {
        "1B": OuterJob(1e9, 24, 0.1),
        "10B": OuterJob(10e9, 48, 0.8),
        "100B": OuterJob(100e9, 108, 4.9),
    }
    for name, method, delay, bits, table in _STREAMING_DILOCO:
        for (model, job), cells in zip(models.items(), table.split(" · "), strict=True):
            this = OuterJob(job.params, job.layers, job.step_s, delay=delay, bits=bits).by(method)
            ours = required_bits_per_s(this, utilisations)
            yield ComparedRow(
                name,
                model,
                utilisations,
                tuple(float(cell) for cell in cells.split()),
                tuple(value / 1e9 for value in ours),
            )


# Name, method, delay in steps, bits a parameter, Gbit/s by model and utilisation.
_STREAMING_DILOCO: tuple[tuple[str, Method, int, int, str], ...] = (
    (
        "Data-parallel",
        "data-parallel",
        0,
        16,
        "86.8 152.6 184.2 222.3 569.0 · 104.8 222.3 222.3 268.3 471.5 · "
        "184.2 323.8 390.7 390.7 471.5",
    ),
    (
        "DiLoCo",
        "diloco",
        0,
        16,
        "1.4 6.2 13.3 23.3 86.8 · 1.7 7.5 16.0 33.9 104.8 · 3.0 11.0 23.3 49.4 184.2",
    ),
    (
        "Streaming DiLoCo",
        "streaming",
        0,
        16,
        "1.4 5.2 9.1 16.0 28.1 · 1.7 5.2 9.1 13.3 19.3 · 2.4 6.2 9.1 11.0 19.3",
    ),
    (
        "+ overlap",
        "streaming",
        1,
        16,
        "1.4 4.3 6.2 9.1 11.0 · 1.7 3.6 5.2 6.2 7.5 · 1.7 3.6 4.3 5.2 5.2",
    ),
    (
        "+ overlap, 4 bits",
        "streaming",
        1,
        4,
        "0.4 0.9 1.7 2.0 3.0 · 0.4 0.9 1.4 1.4 1.7 · 0.5 0.9 1.1 1.1 1.4",
    ),
)


def _nearest(gbit_per_s: float) -> int:
    return int(np.argmin(np.abs(np.log(paper_grid() / 1e9 / gbit_per_s))))
