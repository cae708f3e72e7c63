"""Whole runs from the command line: killed, damaged, stopped, gone on; and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family import ranks_of
from safetensors.torch import load_file

from longspan.balance import EVEN
from longspan.cli import main
from longspan.trace import Note, curve, read_trace

STEPS = 12
MODEL = {
    "type": "llama",
    "config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.0,
    },
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text, uneven: the sources of this library's tests, line by line and whole."""
    path = tmp_path_factory.mktemp("documents") / "texts.jsonl"
    sources = sorted(Path(__file__).parent.glob("test_*.py"))
    with path.open("w", encoding="utf-8") as file:
        for source in sources:
            text = source.read_text(encoding="utf-8")
            for part in (text[:1500], *text[:2000].splitlines()[:20]):
                file.write(json.dumps({"text": part}) + "\n")
    return path


def settings(documents: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "runs": str(runs),
        "data": {"path": str(documents), "max_length": 600},
        "model": MODEL,
        "parallel": {"order": "zigzag"},
        "optimizer": {"lr": 0.003, "warmup_steps": 2},
        "train": {"steps": STEPS, "validate_every": 6, "accumulate": 2},
        "checkpoint": {"every": 2, "keep": 3},
    } | changes


def write(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def command(config: Path, nproc: int = 2) -> list[str]:
    return [sys.executable, "-m", "longspan", "train", str(config), "--nproc", str(nproc)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def train(config: Path, *changes: str) -> None:
    """As the command does it, in this process: its ranks' imports are made once for all tests."""
    with pytest.raises(SystemExit) as end:
        main(["train", str(config), "--nproc", "2", *(f"--set={change}" for change in changes)])
    assert end.value.code == 0


def losses(runs: Path) -> list[tuple[int, float]]:
    return curve(read_trace(runs / "run" / "trace.jsonl"), "loss")


def wait_for_step(runs: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    trace = runs / "run" / "trace.jsonl"
    while time.monotonic() < deadline:
        if trace.exists() and f'"sample","step":{step},' in trace.read_text(encoding="utf-8"):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never reached")


@pytest.fixture(scope="module")
def undisturbed(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    train(write(runs, settings(documents, runs)))
    return runs


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    rows = list(read_trace(undisturbed / "run" / "trace.jsonl"))
    kinds = [row.kind for row in rows if isinstance(row, Note)]
    assert kinds[:4] == ["start", "data", "leak_probe", "batch"] and kinds[-1] == "end"
    assert [step for step, _ in curve(rows, "loss")] == list(range(1, STEPS + 1))
    assert curve(rows, "loss")[-1][1] < curve(rows, "loss")[0][1]
    assert [step for step, _ in curve(rows, "validation_loss")] == [6, 12]
    for figure in ("tokens_per_s", "grad_norm", "attention_imbalance", "ring_bytes"):
        assert all(value > 0 for _, value in curve(rows, figure))
    kept = sorted(path.name for path in (undisturbed / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000010", "step-00000012"]
    assert "<svg" in (undisturbed / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_balanced_documents_are_exact_and_even(documents: Path, tmp_path: Path) -> None:
    changes = {"parallel": {"order": "balanced"}, "checks": {"exactness": True}}
    config = write(tmp_path, settings(documents, tmp_path, **changes))
    train(config, "train.steps=2")
    rows = list(read_trace(tmp_path / "run" / "trace.jsonl"))
    (found,) = (row.about for row in rows if isinstance(row, Note) and row.kind == "exactness")
    assert found["gradient_difference"] < 1e-4
    for figure in ("attention_imbalance", "token_imbalance"):
        assert all(value <= EVEN for _, value in curve(rows, figure))


@pytest.mark.slow
def test_recomputed_activations_change_nothing(
    documents: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = write(tmp_path, settings(documents, tmp_path))
    train(config, "train.checkpointing=full")
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.slow
def test_in_bfloat16_gradients_are_one_process(documents: Path, tmp_path: Path) -> None:
    about = {"steps": 2, "dtype": "bfloat16", "checkpointing": "selective"}
    config = write(tmp_path, settings(documents, tmp_path, train=about, checks={"exactness": True}))
    train(config)
    assert [step for step, _ in losses(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_killed_and_damaged_it_goes_on_bit_for_bit(
    documents: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = write(tmp_path, settings(documents, tmp_path))
    process = subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 5)
    os.kill(max(ranks_of(process.pid)), signal.SIGKILL)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 1
    assert (
        "was killed by signal 9" in told
        and "the same command goes on" in told
        and "Traceback" not in told
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = max(path for path in checkpoints.iterdir() if path.name.startswith("step-"))
    victim = next(newest.glob("shard-00002*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)

    done = run(command(config))
    assert done.returncode == 0, done.stderr
    assert f"refused: {newest}: {victim.name}" in done.stdout.replace("\n", "")
    assert "going on after step" in done.stdout
    assert losses(tmp_path) == losses(undisturbed)
    found, expected = weights(tmp_path), weights(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def weights(runs: Path) -> dict[str, torch.Tensor]:
    """Each rank's part of weights, optimizer and generators in the last checkpoint."""
    folder = runs / "run" / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{file.name} {name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
def test_sigterm_saves_and_torchrun_goes_on(
    documents: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = write(tmp_path, settings(documents, tmp_path, checkpoint={"every": 100}))
    process = subprocess.Popen(command(config), stdout=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "the same command goes on from there" in told
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 2 <= int(kept.name.removeprefix("step-")) < STEPS
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rest = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = run([*torchrun, *rest, "-m", "longspan", "train", str(config)])
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(undisturbed)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    told = capsys.readouterr().err
    assert caught.value.code == 2, told
    assert told.startswith("longspan: ") and told.count("\n") == 1
    return told


def test_bad_input_is_one_line(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*changes: str, nproc: int = 2) -> str:
        config = write(tmp_path, settings(documents, tmp_path / "runs"))
        options = [word for change in changes for word in ("--set", change)]
        return refused(capsys, "train", str(config), "--nproc", str(nproc), *options)

    nothing, broken = tmp_path / "nothing", tmp_path / "broken.jsonl"
    nothing.mkdir()
    broken.write_text('{"text": "a"}\n{"text": "b"\n', encoding="utf-8")
    assert "no config at" in refused(capsys, "train", str(tmp_path / "none.yaml"))
    assert "nowhere" in train("data.path=nowhere")
    assert "nothing" in train(f"data.path={nothing}")
    assert "broken.jsonl:2" in train(f"data.path={broken}")
    assert "broken.jsonl:2" in refused(capsys, "diagnose", str(broken))
    assert "did you mean steps?" in train("train.stepz=3")
    assert "parallel.sp is 2, which doesn't divide 3" in train("parallel.sp=2", nproc=3)
    assert "data-parallel ranks, but the documents fill only" in train(
        "parallel.sp=1", "data.max_length=100000", "train.accumulate=1", nproc=64
    )
    assert "needs about" in train("model.config.intermediate_size=99000000000")
    assert "attention_dropout: 0.0" in train("model.config.attention_dropout=0.5")
    assert "model: " in train("model.type=llamma")
    assert "give a type" in train("model.type=null")
    assert "the model knows 100 tokens, the tokenizer makes 257" in train(
        "model.config.vocab_size=100"
    )
    assert not (tmp_path / "runs" / "run").exists(), "nothing of a refused run is kept"


def test_another_run_is_not_overwritten(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", settings(documents, tmp_path, optimizer={"lr": 0.5}))
    config = write(tmp_path / "new", settings(documents, tmp_path))
    told = refused(capsys, "train", str(config), "--nproc", "1")
    assert "holds a run with other settings (optimizer.lr: 0.5 -> 0.003)" in told


@pytest.mark.slow
def test_a_mistake_met_by_the_ranks_is_one_line(documents: Path, tmp_path: Path) -> None:
    """Only the processes find out: every rank raises, one of them tells."""
    config = write(tmp_path, settings(documents, tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir()
    done = run(command(config))
    assert done.returncode == 2
    assert done.stderr.count("longspan: ") == 1 and "Traceback" not in done.stderr
    assert "manifest.json is missing" in done.stderr


def test_diagnose_prints_json(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["diagnose", str(documents), "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["verdict"]) == 3 and found["lengths"]["documents"] > 50
