"""A plant of coupled tanks in closed loops: physics, sensors, faults, and the log they leave.

Tanks stand in a ring. Water flows between neighbours and out of each tank by Torricelli's law;
every other tank has a pump, whose controller holds its level at a set point that an operator
changes now and then. Each tank has three sensors: level, temperature and outflow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FAULTS", "PlantLog", "simulate_plant"]

FAULTS = ("leak", "blocked pipe", "weak pump", "drifting sensor", "stuck sensor")

_GRAVITY = 9.81
_STEP_S = 1.0
_AREA = 1.5  # m²
_PIPE = 0.010  # m², between neighbours
_OUTLET = 0.006  # m²
_PUMP = 0.10  # m³/s at most
_FEED_C, _ROOM_C, _LOSS = 60.0, 15.0, 2e-4  # °C, °C, 1/s
_NOISE = (0.01, 0.15, 0.0004)  # of level (m), temperature (°C), flow (m³/s)


@dataclass(frozen=True)
class PlantLog:
    """``values`` (time, sensors), each sensor's standardised; ``fault`` (time, sensors): where the
    sensor's tank, or the sensor, has one.
    """

    values: Tensor
    fault: Tensor


def simulate_plant(steps: int, tanks: int, seed: int, faults_per_1000: float = 2.0) -> PlantLog:
    """``steps`` seconds of a plant of ``tanks`` tanks; the same seed leaves the same log."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    area = _AREA * uniform(0.7, 1.3, tanks)
    pipe, outlet = _PIPE * uniform(0.6, 1.4, tanks), _OUTLET * uniform(0.6, 1.4, tanks)
    has_pump = torch.arange(tanks) % 2 == 0
    level, heat = uniform(0.8, 1.6, tanks), uniform(25.0, 35.0, tanks)
    target, integral = uniform(0.8, 2.0, tanks), torch.zeros(tanks, dtype=torch.float64)
    faults = _Faults(tanks, generator)
    rows, marks = [], []
    for step in range(steps):
        if torch.rand(1, generator=generator).item() < faults_per_1000 / 1000:
            faults.start(step)
        faults.end(step)
        changed = torch.rand(tanks, generator=generator) < 1 / 400
        target = torch.where(changed, uniform(0.8, 2.0, tanks), target)
        error = target - level
        pump = (0.05 + 0.12 * error + 0.0008 * integral).clamp(0, _PUMP) * has_pump
        integral = integral + error * ((pump > 0) & (pump < _PUMP))
        pump = pump * faults.factor("weak pump")
        drop = level - level.roll(-1)
        across = (
            pipe * faults.factor("blocked pipe") * drop.sign() * (2 * _GRAVITY * drop.abs()) ** 0.5
        )
        out = outlet * (2 * _GRAVITY * level) ** 0.5
        lost = 0.4 * _OUTLET * (2 * _GRAVITY * level) ** 0.5 * (1 - faults.factor("leak"))
        received = across.roll(1)
        # Water carries the heat of where it comes from.
        warm = (
            pump * (_FEED_C - heat)
            + received.clamp(min=0) * (heat.roll(1) - heat)
            + (-across).clamp(min=0) * (heat.roll(-1) - heat)
        )
        volume = area * level
        heat = heat + _STEP_S * (warm / volume - _LOSS * (heat - _ROOM_C))
        level = (level + _STEP_S * (pump + received - across - out - lost) / area).clamp(0.05, 3.0)
        seen = torch.stack((level, heat, out), 1)
        noise = torch.randn(tanks, 3, generator=generator, dtype=torch.float64)
        rows.append(faults.read(step, seen + noise * torch.tensor(_NOISE, dtype=torch.float64)))
        marks.append(faults.marks())
    values = torch.stack(rows).flatten(1)
    values = (values - values.mean(0)) / values.std(0).clamp(min=1e-6)
    return PlantLog(values.float(), torch.stack(marks).flatten(1))


class _Faults:
    """Faults under way: kind, tank, sensor, from, to."""

    def __init__(self, tanks: int, generator: torch.Generator) -> None:
        self.tanks, self.generator = tanks, generator
        self.active: list[tuple[str, int, int, int, int]] = []
        self.last = torch.zeros(tanks, 3, dtype=torch.float64)

    def _pick(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.generator).item())

    def start(self, step: int) -> None:
        kind, tank, sensor = FAULTS[self._pick(len(FAULTS))], self._pick(self.tanks), self._pick(3)
        self.active.append((kind, tank, sensor, step, step + 120 + self._pick(240)))

    def end(self, step: int) -> None:
        self.active = [fault for fault in self.active if fault[4] > step]

    def factor(self, kind: str) -> Tensor:
        """What is left of a flow, for each tank."""
        left = torch.ones(self.tanks, dtype=torch.float64)
        for name, tank, *_ in self.active:
            if name == kind:
                left[tank] = 0.25
        return left

    def read(self, step: int, seen: Tensor) -> Tensor:
        """What the sensors tell, (tanks, 3)."""
        told = seen.clone()
        for kind, tank, sensor, start, _ in self.active:
            if kind == "drifting sensor":
                told[tank, sensor] += (step - start) * 20 * _NOISE[sensor] / 100
            elif kind == "stuck sensor":
                told[tank, sensor] = self.last[tank, sensor]
        self.last = told
        return told

    def marks(self) -> Tensor:
        found = torch.zeros(self.tanks, 3, dtype=torch.bool)
        for kind, tank, sensor, *_ in self.active:
            found[tank, sensor if "sensor" in kind else slice(None)] = True
        return found
