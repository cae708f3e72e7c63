"""Runs whose layers a plan splits: the losses of one process, gone on with, exported; bad input."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from longspan.cli import main
from longspan.cluster.fabric import Link
from longspan.cluster.spec import Device, uniform, write_cluster
from longspan.errors import LongspanError
from longspan.plan import LayerPlan, read_plan
from longspan.trace import Note, curve, read_trace
from longspan.train.batches import Batches
from longspan.train.config import Config, load_config
from longspan.train.export import export
from longspan.train.inspect import claim_run, inspect
from longspan.train.job import make_job
from longspan.train.loop import train
from longspan.train.optimize import lr_at, make_optimizer, set_lr
from longspan.train.parallelize import build_model, model_config
from longspan.train.record import Recorder
from tests.ranks import Ranks

STEPS, ROWS = 3, 6
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MODEL: dict[str, Any] = {"type": "llama", "config": SIZES | {"num_hidden_layers": 2}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven documents, and a cluster that is slow enough for a tiny model to be split."""
    home = tmp_path_factory.mktemp("strategy")
    with (home / "texts.jsonl").open("w", encoding="utf-8") as file:
        for line in (Path(__file__).read_text(encoding="utf-8") * 2).splitlines():
            file.write(json.dumps({"text": line or "nothing"}) + "\n")
    device = Device(memory_bytes="1GB", bytes_per_s=1e9, peak={"matmul": {"float32": 1e8}})
    links = [Link(latency_s=1e-6, bytes_per_s=rate) for rate in (1e8, 1e7)]
    cluster = uniform(device, nodes=2, devices=2, link=links[0], network=links[1])
    write_cluster(cluster, home / "cluster.yaml")
    return home


def written(home: Path, name: str, **changes: Any) -> Path:
    values = {
        "name": name,
        "runs": str(home / "runs"),
        "data": {"path": str(home / "texts.jsonl"), "max_length": 48},
        "model": MODEL,
        "parallel": {"strategy": "auto", "cluster": str(home / "cluster.yaml")},
        "optimizer": {"lr": 0.01, "warmup_steps": 1, "clip_norm": 0.5},
        "train": {"steps": STEPS, "global_batch": ROWS, "accumulate": 2, "validate_every": 2},
        "checks": {"exactness": True},
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return path


def trained(sp: DeviceMesh, path: Path, stops: bool) -> str:
    """On every rank: what a worker does; ``stops``: after the first step."""
    config = load_config(path)
    try:
        inspect(config, 4, 4)
        if sp.get_rank() == 0:
            claim_run(config)
        with Recorder(config.run, sp.get_rank() == 0, config.train.steps) as recorder:
            train(make_job(config, torch.device("cpu"), recorder), SimpleNamespace(heard=stops))  # type: ignore[arg-type]
    except LongspanError as error:
        return str(error)
    return ""


def one_process(config: Config) -> tuple[list[float], list[float], torch.nn.Module]:
    """Losses, gradients' norms and the model of a plain loop, a document at a time."""
    batches = Batches(config)
    model = build_model(config, batches.tokenizer.vocab_size, "cpu")
    optimizer = make_optimizer(model, config.optimizer)
    losses, norms = [], []
    for step in range(STEPS):
        batch = batches.rows(step * ROWS, ROWS)
        total = 0.0
        for one in batch.sequences:
            logits = model(input_ids=torch.from_numpy(one.tokens)[None]).logits[0]
            loss = F.cross_entropy(logits, torch.from_numpy(one.targets), reduction="sum")
            (loss / batch.tokens).backward()
            total += loss.item() / batch.tokens
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        set_lr(optimizer, lr_at(step, STEPS, config.optimizer))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, model


def told(config: Config, figure: str) -> list[float]:
    return [value for _, value in curve(read_trace(config.run / "trace.jsonl"), figure)]


def test_a_run_is_one_process_goes_on_and_is_exported(home: Path, ranks: Ranks) -> None:
    whole, halves = written(home, "whole"), written(home, "halves")
    for path, stops in ((whole, False), (halves, True), (halves, False)):
        assert ranks.run(trained, path, stops) == [""] * 4
    config, other = load_config(whole), load_config(halves)
    losses, norms, model = one_process(config)
    assert told(config, "loss") == pytest.approx(losses, rel=1e-5)
    assert told(config, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert told(config, "loss") == told(other, "loss")
    assert told(config, "validation_loss")[-1] == told(other, "validation_loss")[-1]
    assert all(0 < share < 1 for share in told(config, "padding"))
    plan = read_plan(LayerPlan, config.run / "strategy.json")
    ways = {tuple(layer.splits) for layer in plan.layers}
    assert len(ways) > 1 and plan.seconds < plan.alternatives["data_parallel"]
    notes = [row for row in read_trace(config.run / "trace.jsonl") if isinstance(row, Note)]
    (found,) = (note.about for note in notes if note.kind == "exactness")
    assert found["gradient_difference"] < 1e-5
    export(config.run / "checkpoints" / f"step-{STEPS:08d}", home / "exported")
    exported = AutoModelForCausalLM.from_pretrained(home / "exported").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(exported[name], weight, atol=1e-5), name


def test_a_plan_that_was_written_is_kept_to(home: Path, ranks: Ranks) -> None:
    plan, path = home / "plan.json", written(home, "kept")
    model_config(load_config(path), 257).save_pretrained(home / "model")
    arguments = [str(home / "model"), "--cluster", str(home / "cluster.yaml"), "--out", str(plan)]
    shape = ["--batch", str(ROWS // 2), "--length", "48", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(["plan-layers", *arguments, *shape])
    assert caught.value.code == 0
    split = {"strategy": str(plan)}
    few = {"steps": 1, "global_batch": ROWS, "accumulate": 2}
    path = written(home, "kept", parallel=split, train=few, checks={})
    assert ranks.run(trained, path, False) == [""] * 4
    kept = read_plan(LayerPlan, load_config(path).run / "strategy.json")
    assert kept == read_plan(LayerPlan, plan)
    assert told(load_config(path), "loss")[0] == pytest.approx(
        one_process(load_config(path))[0][0], rel=1e-5
    )
    path = written(home, "other", parallel=split, train=few, model=dict(MODEL, config=SIZES))
    for said in ranks.run(trained, path, False):
        assert "the plan is of another model" in said


def refused(capsys: pytest.CaptureFixture[str], path: Path, *changes: str) -> str:
    options = [word for change in changes for word in ("--set", change)]
    with pytest.raises(SystemExit) as caught:
        main(["train", str(path), "--nproc", "4", *options])
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert said.startswith("longspan: ") and said.count("\n") == 1
    return said


def test_what_does_not_go_together_is_one_line(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(home, "bad")
    for change, words in {
        "parallel.sp=2": "parallel.sp is 2, but",
        "parallel.mode=flexible": "parallel.mode is flexible",
        "parallel.order=striped": "parallel.order is striped",
        "outer.sites=2": "outer.sites is more than 1",
        "train.checkpointing=full": "train.checkpointing is full",
        "train.dtype=bfloat16": "float32 only",
        "train.global_batch=null": "needs train.global_batch",
        "train.accumulate=4": "doesn't divide train.global_batch 6",
        "parallel.cluster=null": "plans for a cluster",
        "parallel.cluster=8x1080ti": "is for 64 devices, but there are 4 processes",
        "parallel.strategy=none.json": "no plan at none.json",
        "model.config.attention_dropout=0.1": "attention_dropout: 0.0",
    }.items():
        assert words in refused(capsys, path, change)
    assert not (home / "runs" / "bad").exists()
