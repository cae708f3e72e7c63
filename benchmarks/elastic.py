"""Sites that are killed, cut off and joined, beside a run that nothing happens to.

In the lab, four sites of 0.4 core and a rendezvous, 50 Mbit/s each; a Llama of 0.9M parameters on
the bytes of the standard library's sources, each site a `longspan train` of its own. Sites 0 to 2
start; at step 60 site 1 is killed with `kill -9`; once it is dropped, the link of site 2 is cut for
20 s; meanwhile site 3 starts and joins. Looked at are the last validation losses, the longest wait
of any site in a step, and whether the survivors' global parameters are the same bits.

    python -m benchmarks.elastic [--steps 800]
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import conclude

SITES, PORT, TIMEOUT_S, CUT_S, SLACK_S = 4, 29400, 8.0, 20.0, 0.5
KILLED, CUT, LATE = 1, 2, 3
KILL_STEP = 60


def config(site: int, steps: int, folder: Path) -> Any:
    """One site's; all but its number and its folder are alike."""
    from longspan.train.config import (
        Checkpoint,
        Checks,
        Config,
        Data,
        Model,
        Optimizer,
        Outer,
        Parallel,
        Train,
    )

    return Config(
        runs=folder / f"site{site}",
        data=Data(path=folder / "stdlib.jsonl", max_length=128, cache=folder / "tokens"),
        model=Model(
            type="llama",
            config={
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        ),
        parallel=Parallel(sp=1),
        outer=Outer(
            sites=SITES,
            site=site,
            rendezvous=f"10.77.0.1:{PORT}",
            timeout_s=TIMEOUT_S,
            sync_every=16,
            delay=2,
            fragment_layers=2,
            lr=0.6,
        ),
        optimizer=Optimizer(lr=1e-3, warmup_steps=30),
        train=Train(steps=steps, validate_every=steps, validation_sequences=128),
        checks=Checks(leak_probe=False),
        checkpoint=Checkpoint(every=steps),
    )


def worker(folder: Path, steps: int) -> None:
    """On every node: the rendezvous on the first, a site on each other."""
    from longspan.elastic.membership import serve_store
    from longspan.train.worker import leave, run_worker

    rank = int(os.environ["RANK"])
    if rank == 0:
        kept = serve_store(PORT)
        awaited(folder / "end")
        leave(0 if kept.port == PORT else 1)
    awaited(folder / f"start{rank - 1}")
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= one | {"MASTER_ADDR": "127.0.0.1"}
    leave(run_worker(config(rank - 1, steps, folder)))


def awaited(path: Path) -> None:
    """Wait for a file."""
    while not path.exists():
        time.sleep(0.05)


def trace(site: int, folder: Path) -> list[dict[str, Any]]:
    """What a site has written so far."""
    path = folder / f"site{site}" / "run" / "trace.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def figures(site: int, name: str, folder: Path) -> list[tuple[int, float]]:
    """(step, value) of a figure of a site."""
    from longspan.trace import curve, read_trace

    return curve(read_trace(folder / f"site{site}" / "run" / "trace.jsonl"), name)


def await_row(
    site: int, folder: Path, wanted: Callable[[dict[str, Any]], bool], after: int = 0
) -> int:
    """The place of a site's first note or sample, from ``after`` on, that is as wanted."""
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline:
        for place, row in enumerate(trace(site, folder)[after:], after):
            if wanted(row.get("about", row)):
                return place
        time.sleep(0.05)
    raise RuntimeError(f"site {site} waits for something that doesn't happen")


def theta(site: int, folder: Path) -> dict[str, bytes]:
    """A site's global parameters at the end."""
    from safetensors.torch import load_file

    (last,) = (folder / f"site{site}" / "run" / "checkpoints" / f"site{site}").glob("step-*")
    found: dict[str, bytes] = {}
    for file in sorted(last.glob("*.safetensors")):
        tensors = load_file(file)
        found |= {n: t.numpy().tobytes() for n, t in tensors.items() if n.startswith("outer.theta")}
    return found


def exchanging(sites: int) -> Callable[[dict[str, Any]], bool]:
    """Whether a row tells that so many sites exchange from there on."""
    return lambda row: row.get("sites") == sites


def run(steps: int, disturbed: bool, folder: Path) -> list[int]:
    """Train; returns the sites that are there at the end."""
    from longspan.lab.lab import Lab
    from longspan.lab.spec import LabSpec
    from longspan.train.batches import Batches
    from longspan.train.demo import write_documents

    write_documents(folder)
    Batches(config(0, steps, folder))
    for site in (0, KILLED, CUT):
        (folder / f"start{site}").touch()
    spec = LabSpec(SITES + 1, bandwidth="50mbit", device_share=[0.2, *SITES * [0.4]])
    command = [sys.executable, "-m", "benchmarks.elastic", "--worker", str(folder), str(steps)]
    left = [0, KILLED, CUT]
    with Lab(spec) as lab:
        job = lab.start(command, stop_on_failure=False)
        place = await_row(0, folder, exchanging(3))
        if disturbed:
            left = [0, CUT, LATE]
            place = await_row(0, folder, lambda row: row.get("step", 0) >= KILL_STEP, place)
            job.signal(1 + KILLED, signal.SIGKILL)
            place = await_row(0, folder, exchanging(2), place + 1)
            lab.cut(1 + CUT)
            cut_s = time.monotonic()
            place = await_row(0, folder, exchanging(1), place + 1)
            (folder / f"start{LATE}").touch()
            time.sleep(max(0.0, CUT_S - (time.monotonic() - cut_s)))
            lab.heal(1 + CUT)
            await_row(0, folder, exchanging(3), place + 1)
        for site in left:
            await_row(site, folder, lambda row: row.get("reason") == "done")
        (folder / "end").touch()
        for site in set(range(SITES)) - set(left):
            job.signal(1 + site, signal.SIGKILL)
        job.wait(60)
    return left


def main() -> None:
    """Both runs, side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=800)
    steps = parser.parse_args().steps
    console, began = Console(record=True, width=100), time.perf_counter()
    table = Table("run", "site", "loss", "longest wait (s)", "merges", box=None)
    losses, longest, alike = {}, 0.0, True
    for disturbed in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            left = run(steps, disturbed, folder)
            for site in left:
                loss = figures(site, "validation_loss", folder)[-1][1]
                wait = max(value for _, value in figures(site, "outer_wait_s", folder)[1:])
                merges = len(figures(site, "outer_cosine", folder))
                told = "disturbed" if disturbed else "undisturbed"
                table.add_row(told, str(site), f"{loss:.4f}", f"{wait:.2f}", str(merges))
                losses[disturbed, site], longest = loss, max(longest, wait)
            print(f"{'disturbed' if disturbed else 'undisturbed'}: loss {loss:.4f}", flush=True)
            alike = alike and all(theta(site, folder) == theta(0, folder) for site in left)
    console.print(table)
    found = {
        "steps": steps,
        "loss_undisturbed": round(losses[False, 0], 4),
        "loss_disturbed": round(losses[True, 0], 4),
        "over_undisturbed": round(losses[True, 0] / losses[False, 0] - 1, 5),
        "longest_wait_s": round(longest, 2),
        "survivors_alike": alike,
        "seconds": round(time.perf_counter() - began),
    }
    targets = {"over_undisturbed": 0.01, "longest_wait_s": TIMEOUT_S + SLACK_S}
    holds = alike and all(found[name] <= target for name, target in targets.items())
    conclude("elastic", found, targets | {"survivors_alike": True}, holds, console.export_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
