"""How much faster attention in a sliding window of S/8 is than full causal attention.

One process, one thread, ``longspan.attend`` forward and backward in float32; the two take turns,
and the figures are medians of their ratios. The target is for lengths at which the kernel's own
tiles are small beside the window.

    python -m benchmarks.window
"""

from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import longspan
from benchmarks.record import conclude

LENGTHS, HEADS, HEAD_DIM, TIMES = (8192, 16384), 2, 64, 5


def seconds(mesh: DeviceMesh, length: int, window: int | None) -> tuple[float, float]:
    """Of forward and of backward."""
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    start = perf_counter()
    out = longspan.attend(q, k, v, mesh=mesh, order="contiguous", window=window)
    middle = perf_counter()
    out.sum().backward()
    return middle - start, perf_counter() - middle


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("sp",))
        for length in LENGTHS:
            turns = [
                (seconds(mesh, length, None), seconds(mesh, length, length // 8))
                for _ in range(TIMES)
            ]
            for number, name in enumerate(("forward", "backward")):
                gain = median(full[number] / near[number] for full, near in turns)
                figures[f"{name}_{length}"] = round(gain, 2)
        dist.destroy_process_group()
    targets = {"forward_16384": 3.0, "backward_16384": 3.0}
    conclude("window", figures, targets, all(figures[x] >= targets[x] for x in targets))


if __name__ == "__main__":
    main()
