"""Peak memory of a language model's head and loss: whole logits, and chunks of them.

32K tokens, 32K words, forward and backward. Each measurement is a process of its own: the peak of
its resident memory, less what it held with hidden states, weights and targets in place. The target
is 1/8 of the whole; loss and gradients are compared, too.

    python -m benchmarks.loss_memory [--tokens 32768] [--words 32768] [--hidden 512]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.record import conclude
from longspan.models.loss import chunked_loss

TARGET = 1 / 8


def resident_bytes() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(dtype: str, way: str, tokens: int, words: int, hidden_size: int) -> None:
    """Print the peak and the results of one way, as a line of JSON."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, hidden_size).to(kind).requires_grad_()
    weight = (torch.randn(words, hidden_size) / hidden_size**0.5).to(kind).requires_grad_()
    targets = torch.randint(words, (tokens,))
    small = torch.randn(2, hidden_size).to(kind).requires_grad_()  # libraries and threads start
    chunked_loss(small, weight[:2], targets[:2] % 2).backward()
    weight.grad = None
    before, start = resident_bytes(), time.perf_counter()
    if way == "whole":
        logits = F.linear(hidden, weight).float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        del logits
    else:
        loss = chunked_loss(hidden, weight, targets)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    grads = [x.grad.double().norm().item() for x in (hidden, weight)]
    print(json.dumps({"peak": peak, "seconds": seconds, "results": [loss.item(), *grads]}))


def in_its_own_process(dtype: str, way: str, sizes: list[int]) -> dict[str, float | list[float]]:
    """What ``measure`` prints there."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loss_memory", "--measure", dtype, way, *map(str, sizes)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float | list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure both ways in float32 and bfloat16."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--words", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--measure", nargs=5)
    given = parser.parse_args()
    if given.measure:
        dtype, way, *numbers = given.measure
        measure(dtype, way, *map(int, numbers))
        return
    sizes = [given.tokens, given.words, given.hidden]
    log = f"{given.tokens} tokens, {given.words} words, hidden size {given.hidden}\n"
    log += f"{'':10}{'way':>8}{'peak, MiB':>12}{'seconds':>10}   loss, norms of gradients\n"
    figures, same = {}, True
    for dtype, rounding in (("float32", 1e-5), ("bfloat16", 1e-2)):
        ways = {way: in_its_own_process(dtype, way, sizes) for way in ("whole", "chunks")}
        for way, found in ways.items():
            results = "  ".join(f"{x:.7g}" for x in found["results"])
            mebibytes, seconds = found["peak"] / 2**20, found["seconds"]
            log += f"{dtype:10}{way:>8}{mebibytes:12.1f}{seconds:10.1f}   {results}\n"
        pairs = zip(ways["whole"]["results"], ways["chunks"]["results"], strict=True)
        same = same and all(abs(a / b - 1) < rounding for a, b in pairs)
        figures[f"{dtype}_peak_ratio"] = round(ways["chunks"]["peak"] / ways["whole"]["peak"], 4)
    print(log, end="")
    holds = same and all(ratio <= TARGET for ratio in figures.values())
    conclude("loss_memory", figures, {"peak_ratio": TARGET}, holds, log)


if __name__ == "__main__":
    main()
