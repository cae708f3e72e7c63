"""The demonstration: from real documents to a report, on four processes, with nothing to fetch.

The documents are the running Python's own standard library: real text with a real long tail.
"""

import json
import os
import sysconfig
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from longspan.data.diagnose import diagnose
from longspan.data.render import render
from longspan.data.tokens import load_tokenizer
from longspan.report.page import write_picture, write_report
from longspan.report.summary import summarise
from longspan.report.table import summary_table
from longspan.trace import read_trace
from longspan.train.config import (
    Checkpoint,
    Checks,
    Config,
    Data,
    Model,
    Optimizer,
    Parallel,
    Train,
    save_config,
)
from longspan.train.inspect import inspect
from longspan.train.launch import launch, prepare
from longspan.train.worker import run_worker

__all__ = ["run_demo", "write_documents"]

_PROCESSES = 4
_STEPS = 60


def run_demo(runs: Path, steps: int | None = None) -> int:
    """Run the demonstration into ``runs/demo``; returns the exit code."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # four Gloo processes, also where there is a GPU
    prepare()
    console = Console(highlight=False)
    config = _config(runs, steps or _STEPS)
    if config.run.exists():
        kept = config.run.with_name(f"demo-{time.strftime('%Y%m%d-%H%M%S')}")
        config.run.rename(kept)
        console.print(f"the demo before this one is kept in {kept}")
    console.rule("1  the documents")
    found = diagnose(
        config.data.path, tokenizer=load_tokenizer(None), max_length=config.data.max_length
    )
    console.print(render(found))
    console.rule("2  training, each sequence on four processes")
    path = runs / "demo.yaml"
    save_config(config, path)
    inspect(config, _PROCESSES, _PROCESSES)
    code = launch(partial(run_worker, config), _PROCESSES)
    if code:
        return code
    console.rule("3  what happened")
    console.print(summary_table(summarise(read_trace(config.run / "trace.jsonl"), "demo")))
    write_picture(config.run, config.run / "picture.svg")
    console.print(f"report: {write_report(config.run)}")
    return 0


def _config(runs: Path, steps: int) -> Config:
    return Config(
        name="demo",
        runs=runs,
        data=Data(path=write_documents(runs), max_length=8192),
        model=Model(
            type="llama",
            config={
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "tie_word_embeddings": True,
            },
        ),
        parallel=Parallel(sp=_PROCESSES),
        optimizer=Optimizer(lr=3e-3),
        train=Train(steps=steps, validate_every=20, validation_sequences=4),
        checks=Checks(exactness=True),
        checkpoint=Checkpoint(every=30),
    )


def write_documents(runs: Path) -> Path:
    """The standard library's sources as JSONL, without what others installed beside them."""
    library = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "__pycache__"}
    path = runs / "stdlib.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(library.rglob("*.py")):
            name = source.relative_to(library)
            if not others & set(name.parts):
                text = source.read_text(encoding="utf-8", errors="replace")
                file.write(json.dumps({"name": str(name), "text": text}) + "\n")
    return path
