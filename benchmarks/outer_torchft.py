"""Streaming DiLoCo beside torchft's: two replicas, H = 24, 240 steps, equal tokens.

In the lab, 2 nodes of one rank and 0.9 core, links as fast as they are. A Llama of 0.87M parameters
on the bytes of the standard library's sources, float32; the same inner optimizer, batches, period,
fragments, share of local parameters kept and outer optimizer for both. torchft runs its own
lighthouse, managers and DiLoCo, whose outer gradients travel as float32: its fp8 needs Triton.
Losses are those of the validation documents, with the global parameters, which torchft calls
original; MB a replica are those that left its node's link, headers and all.

`make bench-peers` installs torchft.

    python -m benchmarks.outer_torchft [--steps 240] [--seeds 1]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.outer import link_bytes
from benchmarks.record import conclude

SITES, EVERY, DELAY, MIX, OUTER_LR, MOMENTUM = 2, 24, 1, 0.5, 0.6, 0.9
FRAGMENT_LAYERS, LENGTH, TIMEOUT_S = 2, 256, 60
PORT = 29510
METHODS = ("data-parallel", "torchft", "longspan")


def config(folder: Path, steps: int, seed: int) -> Any:
    """The inner training, the same for all."""
    from longspan.train.config import Config, Data, Model, Optimizer, Parallel, Train

    return Config(
        runs=folder,
        data=Data(path=folder / "stdlib.jsonl", max_length=LENGTH),
        model=Model(
            type="llama",
            config={
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        ),
        parallel=Parallel(sp=1),
        optimizer=Optimizer(lr=2e-3, warmup_steps=30),
        train=Train(steps=steps, seed=seed, validation_sequences=128),
    )


def worker(method: str, steps: int, seed: int, folder: Path) -> None:
    """On every rank: train by a method, and write what came of it."""
    import torch
    import torch.distributed as dist

    from longspan.comm.mesh import connect, make_mesh
    from longspan.models.transformers import patch
    from longspan.train.batches import Batches
    from longspan.train.optimize import lr_at, make_optimizer, set_lr
    from longspan.train.parallelize import build_model
    from longspan.train.step import StepRunner, evaluating

    torch.set_num_threads(1)
    device = connect(TIMEOUT_S)
    mesh, site = make_mesh(SITES, 1, "cpu", SITES), dist.get_rank()
    settings = config(folder, steps, seed)
    batches = Batches(settings)
    model = build_model(settings, batches.tokenizer.vocab_size, device)
    patch(model, mesh=mesh["sp"])
    runner = StepRunner(model, mesh, "contiguous")
    optimizer = make_optimizer(model, settings.optimizer)
    start = {"data-parallel": all_reduce, "torchft": diloco, "longspan": outer_sync}[method]
    before_step, after_step, globally = start(model, optimizer, site)
    cursor = 0
    dist.barrier()
    before, began = link_bytes(), time.perf_counter()
    for step in range(steps):
        batch = batches.step(cursor, 0, 1, site, SITES)
        cursor = batch.cursor
        runner.gradients(batch)
        before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
        set_lr(optimizer, lr_at(step, steps, settings.optimizer))
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    seconds, crossed = time.perf_counter() - began, link_bytes() - before
    share = batches.validate(0, 1)
    with globally(), evaluating(model), torch.no_grad():
        loss = sum(float(runner.loss_sum(one)) for one in share.sequences) / share.tokens
        sums = [float(parameter.double().sum()) for parameter in model.parameters()]
    found = {
        "loss": loss,
        "seconds": seconds,
        "crossed": crossed,
        "parameters": model.num_parameters(),
        "sums": sums,
    }
    (folder / f"{method}{site}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


# What a method does before and after an optimizer step, and where its global parameters are.
Ways = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def nothing() -> None:
    """As it says."""


def all_reduce(model: Any, optimizer: Any, site: int) -> Ways:
    """One all-reduce of all gradients a step."""
    from contextlib import nullcontext

    import torch
    import torch.distributed as dist

    def average() -> None:
        grads = [parameter.grad for parameter in model.parameters()]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= SITES
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view(grad.shape))

    return average, nothing, nullcontext


def outer_sync(model: Any, optimizer: Any, site: int) -> Ways:
    """OuterSync over a group of its own."""
    import torch.distributed as dist

    from longspan.outer.average import GroupAverage
    from longspan.outer.fragments import split
    from longspan.outer.sync import OuterSync

    outer = OuterSync(
        model,
        average=GroupAverage(dist.new_group(backend="gloo"), TIMEOUT_S),
        fragments=split(model, layers=FRAGMENT_LAYERS),
        sync_every=EVERY,
        delay=DELAY,
        mix=MIX,
        outer_lr=OUTER_LR,
        momentum=MOMENTUM,
        codec="e3m0",
    )
    return nothing, outer.step, outer.global_parameters


def diloco(model: Any, optimizer: Any, site: int) -> Ways:
    """torchft's streaming DiLoCo, of the same fragments; it hooks itself to the optimizer."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch import nn
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    from longspan.lab.network import address
    from longspan.schedule.outer import strided

    kept: list[Any] = []
    if site == 0:
        kept.append(LighthouseServer(bind=f"0.0.0.0:{PORT}", min_replicas=SITES))
    dist.barrier()
    store = dist.TCPStore(address(site), 0, is_master=True, wait_for_workers=False)
    wait = timedelta(seconds=TIMEOUT_S)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=wait),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=SITES,
        use_async_quorum=False,
        timeout=wait,
        quorum_timeout=wait,
        connect_timeout=wait,
        rank=0,
        world_size=1,
        store_addr=address(site),
        store_port=store.port,
        lighthouse_addr=f"http://{address(0)}:{PORT}",
        replica_id=f"replica{site}",
        hostname=address(site),
        init_sync=False,
    )
    inner = model.model
    pieces = [
        nn.ModuleList(inner.layers[place] for place in places)
        for places in strided(len(inner.layers), FRAGMENT_LAYERS)
    ]
    pieces.append(nn.ModuleList([inner.embed_tokens, inner.norm, model.lm_head]))
    synced = DiLoCo(
        manager,
        pieces,
        optimizer,
        [
            torch.optim.SGD(piece.parameters(), lr=OUTER_LR, momentum=MOMENTUM, nesterov=True)
            for piece in pieces
        ],
        sync_every=EVERY,
        fragment_sync_delay=DELAY,
        fragment_update_alpha=MIX,
    )
    synced.__enter__()
    kept += [store, manager, synced]

    @contextmanager
    def globally() -> Iterator[None]:
        assert kept and manager.current_step() > 0, "torchft has committed nothing"
        synced._restore_parameters()
        yield

    return nothing, nothing, globally


def run(method: str, steps: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """What both replicas have written."""
    from longspan.lab.lab import Lab
    from longspan.lab.spec import LabSpec

    command = [sys.executable, "-m", "benchmarks.outer_torchft", "--worker", method]
    with Lab(LabSpec(SITES, 1, device_share=0.9)) as lab:
        lab.run([*command, str(steps), str(seed), str(folder)], timeout_s=170).check()
    return [json.loads((folder / f"{method}{site}.json").read_text("utf-8")) for site in (0, 1)]


def main() -> None:
    """Every method with every seed; the means are compared."""
    from longspan.train.batches import Batches
    from longspan.train.demo import write_documents

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    console, began = Console(record=True, width=100), time.perf_counter()
    table = Table("seed", "method", "loss", "MB a replica", "s a step", "replicas alike", box=None)
    rows: dict[str, list[tuple[float, float, float]]] = {method: [] for method in METHODS}
    alike = True
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_documents(folder)
            Batches(config(folder, given.steps, seed))  # tokenised once, so that no rank waits
            for method in METHODS:
                found, other = run(method, given.steps, seed, folder)
                row = found["loss"], found["crossed"] / 1e6, found["seconds"] / given.steps
                rows[method].append(row)
                same = found["sums"] == other["sums"]
                alike = alike and (same or method == "torchft")
                loss, crossed, step_s = row
                told = f"{loss:.4f}", f"{crossed:.2f}", f"{step_s:.4f}", "yes" if same else "no"
                table.add_row(str(seed), method, *told)
                print(f"seed {seed}, {method}: loss {loss:.4f}, {crossed:.2f} MB", flush=True)
            parameters = found["parameters"]
    console.print(table)
    losses, crossed, times = (
        {method: mean(column) for method, column in zip(METHODS, columns, strict=True)}
        for columns in zip(*(zip(*rows[method], strict=True) for method in METHODS), strict=True)
    )
    figures = {
        "parameters": parameters,
        "steps": given.steps,
        "seeds": given.seeds,
        **{f"loss_{method}": round(loss, 4) for method, loss in losses.items()},
        **{f"mb_{method}": round(size, 2) for method, size in crossed.items()},
        **{f"step_s_{method}": round(seconds, 4) for method, seconds in times.items()},
        "over_torchft": round(losses["longspan"] / losses["torchft"] - 1, 5),
        "over_data_parallel": round(losses["longspan"] / losses["data-parallel"] - 1, 5),
        "fewer_bytes": round(crossed["torchft"] / crossed["longspan"], 2),
        "alike": alike,
        "seconds": round(time.perf_counter() - began),
    }
    most = {"over_torchft": 0.0, "over_data_parallel": 0.0042, "seconds": 180 * given.seeds}
    targets = most | {"fewer_bytes": 6, "alike": True}
    holds = all(figures[name] <= target for name, target in most.items())
    holds = holds and figures["fewer_bytes"] >= targets["fewer_bytes"] and alike
    conclude("outer_torchft", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, total, number, where = sys.argv[2:]
        worker(kind, int(total), int(number), Path(where))
    else:
        main()
