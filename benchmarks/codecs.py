"""The codecs of outer gradients: bytes, speed on one core, and what averaging loses.

Speed is that of encoding and decoding 16 MB of float32 again and again. The cosine is between the
exact mean of two sites' outer gradients and the mean of what their codes stand for, over the
fragments of a small Llama that each site has trained by itself for 30 steps on its own half of the
standard library's sources.

    python -m benchmarks.codecs
"""

import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import conclude
from longspan.outer.compress import CodecName, codec
from longspan.outer.fragments import split

NUMBERS, REPEATS, STEPS, LENGTH, BATCH = 4_000_000, 15, 30, 128, 4


def coded(name: str, values: Tensor) -> Tensor:
    """What the codes of ``values`` stand for."""
    codes = torch.empty(codec(name).wire_bytes(len(values)), dtype=torch.uint8)
    assert codec(name).encode(values, codes)
    decoded = torch.empty_like(values)
    codec(name).decode(codes, decoded)
    return decoded


def gigabytes_per_s(name: str) -> float:
    """Of float32, encoded and decoded, the best of some."""
    values, best = torch.randn(NUMBERS), float("inf")
    codes = torch.empty(codec(name).wire_bytes(NUMBERS), dtype=torch.uint8)
    decoded = torch.empty_like(values)
    for _ in range(REPEATS):
        start = time.perf_counter()
        codec(name).encode(values, codes)
        codec(name).decode(codes, decoded)
        best = min(best, time.perf_counter() - start)
    return 4 * NUMBERS / best / 1e9


def outer_gradients() -> list[list[Tensor]]:
    """Site by site, fragment by fragment."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from longspan.train.demo import write_documents

    with tempfile.TemporaryDirectory() as folder:
        text = write_documents(Path(folder)).read_bytes()
    sites = []
    for site in range(2):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                num_attention_heads=4,
            )
        )  # fmt: skip
        before = [[p.detach().clone() for p in f.parameters.values()] for f in split(model)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        half = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().chunk(2)[site]
        for step in range(STEPS):
            at = torch.arange(BATCH) * LENGTH + step * BATCH * LENGTH
            tokens = torch.stack([half[start : start + LENGTH] for start in at.tolist()])
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        sites.append(
            [
                torch.cat([(a - b.detach()).reshape(-1) for a, b in zip(old, new, strict=True)])
                for old, new in zip(
                    before, [f.parameters.values() for f in split(model)], strict=True
                )
            ]
        )
    return sites


def main() -> None:
    """Measure each codec."""
    torch.set_num_threads(1)
    console = Console(record=True, width=100)
    table = Table("codec", "smaller", "GB/s", "cosine to the exact mean", box=None)
    sites = outer_gradients()
    figures: dict[str, float] = {}
    for name in get_args(CodecName):
        smaller = 4 * NUMBERS / codec(name).wire_bytes(NUMBERS)
        speed = gigabytes_per_s(name)
        cosine = mean(
            torch.cosine_similarity(
                (one + other).double(), (coded(name, one) + coded(name, other)).double(), dim=0
            ).item()
            for one, other in zip(*sites, strict=True)
        )
        table.add_row(name, f"{smaller:.2f}", f"{speed:.2f}", f"{cosine:.5f}")
        figures |= {
            f"{name}_smaller": round(smaller, 3),
            f"{name}_gb_per_s": round(speed, 2),
            f"{name}_cosine": round(cosine, 5),
        }
    console.print(table)
    targets = {
        **{f"{name}_smaller": 7.5 for name in ("int4", "e3m0")},
        **{f"{name}_gb_per_s": 1.0 for name in ("int4", "e3m0")},
        "e3m0_cosine": 0.98,
        "int4_cosine": 0.995,
    }
    holds = all(figures[name] >= target for name, target in targets.items())
    conclude("codecs", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    main()
