"""The plant's example: its physics, and the same training on four ranks as on one."""

from dataclasses import replace

import torch
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh

from examples.plant.tanks import simulate_plant
from examples.plant.train import Settings, train

SMALL = Settings(
    tanks=4, seconds=4000, patch=8, times=16, width=16, heads=2, pairs=1, batch=4, steps=40
)


def test_the_log() -> None:
    log = simulate_plant(2000, 5, 1, faults_per_1000=5)
    assert log.values.shape == log.fault.shape == (2000, 15)
    assert torch.isfinite(log.values).all() and 0 < log.fault.float().mean() < 0.9
    again = simulate_plant(2000, 5, 1, faults_per_1000=5)
    assert torch.equal(log.values, again.values)
    # Levels and outflows of a tank go together, but for faults.
    whole = simulate_plant(2000, 5, 1, faults_per_1000=0)
    assert not whole.fault.any()
    values = whole.values.unflatten(1, (5, 3))
    assert ((values[..., 0] - values[..., 2]).abs() < 0.5).float().mean() > 0.9


def test_it_learns_to_foretell() -> None:
    found = train(replace(SMALL, steps=150))
    assert found.losses[-1] < 0.5 * found.losses[0] and found.error < found.persistence


def on_ranks(mesh: DeviceMesh) -> list[float]:
    result = train(SMALL, "workstations-10gbe", mesh)
    return [*result.losses, result.error, result.persistence, result.faulty, result.normal]


def test_training_on_four_ranks_is_training_on_one(ranks: Ranks) -> None:
    alone = train(SMALL)
    expected = [*alone.losses, alone.error, alone.persistence, alone.faulty, alone.normal]
    for found in ranks.run(on_ranks):
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-3)
        assert abs(found[0] - expected[0]) < 1e-5
