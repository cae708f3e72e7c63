"""The small commands around a run: doctor, emit, verify, export."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from longspan.cli import app
from longspan.commands.emit import Job, Launcher, launch_file
from longspan.errors import CheckpointError, ConfigError
from longspan.outer.average import InProcess
from longspan.outer.fragments import split
from longspan.outer.sync import OuterSync
from longspan.train import doctor
from longspan.train.checkpoint import Progress, save
from longspan.train.config import Config, Data, Model, Train, save_config
from longspan.train.parallelize import build_model

JOB = Job("My_run.1", Path("a b.yaml"), nodes=2, ranks=4, gpu="H100", image="here/it", hours=3)


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def config_in(folder: Path) -> Config:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Model(type="llama", config=small | {"intermediate_size": 24})
    return Config(
        name="x", runs=folder, data=Data(path=folder), model=model, train=Train(steps=2)
    )  # fmt: skip


def write_run(mesh: DeviceMesh, config: Config) -> dict[str, torch.Tensor]:
    model = build_model(config, 257, "cpu")
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        save(config.run / "checkpoints", model, optimizer, Progress(step, step), keep=2)
    whole = {n: p.full_tensor() for n, p in model.named_parameters() if isinstance(p, DTensor)}
    return {name: weight.detach().clone() for name, weight in whole.items()}


def write_site(mesh: DeviceMesh, config: Config) -> dict[str, torch.Tensor]:
    """A site's local parameters have gone on from the global ones, which are returned."""
    model = build_model(config, 257, "cpu")
    agreed = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    fully_shard(model, mesh=mesh)
    outer = OuterSync(model, average=InProcess(1).site(0), fragments=split(model))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    optimizer = torch.optim.AdamW(model.parameters())
    save(config.run / "checkpoints/site0", model, optimizer, Progress(1, 1), keep=2, outer=outer)
    return agreed


@pytest.fixture(scope="module")
def finished(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = config_in(tmp_path_factory.mktemp("runs"))
    save_config(config, config.run / "config.yaml")
    return config.run, ranks.run(write_run, config, world=4)[0]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_an_export_is_a_hugging_face_folder(finished: tuple[Path, Any], tmp_path: Path) -> None:
    run, weights = finished
    told = cli("export", run, tmp_path / "out", "--json")
    assert told.exit_code == 0
    assert json.loads(told.stdout)["checkpoint"].endswith("step-00000002")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    again = cli("export", run, tmp_path / "out")
    assert isinstance(again.exception, ConfigError) and "name a new folder" in str(again.exception)


def test_a_sites_export_is_the_global_parameters(ranks: Ranks, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    save_config(config, config.run / "config.yaml")
    agreed = ranks.run(write_site, config, world=4)[0]
    assert "site0/step-00000001" in cli("verify", config.run).stdout
    assert cli("export", config.run, tmp_path / "out").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert all(torch.equal(agreed[name], weight) for name, weight in model.named_parameters())


def test_a_flipped_bit_is_found_and_not_exported(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    assert cli("verify", run).exit_code == 0
    newest = run / "checkpoints" / "step-00000002"
    flip_a_bit(next(newest.glob("*.safetensors")))
    told = json.loads(cli("verify", run, "--json").stdout)
    assert told["code"] == 1
    assert "sha256 differs" in told["checkpoints"][0]["fault"]
    with_older = json.loads(cli("export", run, tmp_path / "out", "--json").stdout)
    assert with_older["checkpoint"].endswith("step-00000001")
    refused = cli("export", newest, tmp_path / "other")
    assert isinstance(refused.exception, CheckpointError)
    assert cli("verify", newest).exit_code == 2
    assert isinstance(cli("verify", tmp_path).exception, CheckpointError)


def test_doctor_tells_each_finding_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    told = cli("doctor", "--json", "--timeout-s", 3600)
    found = json.loads(told.stdout)
    assert told.exit_code == found["code"] == 2
    levels = {one["what"]: one["level"] for one in found["findings"]}
    assert levels["network interface"] == "blocked" and levels["time-out"] == "advice"
    assert all(one["mend"] for one in found["findings"] if one["level"] != "fine")
    assert len(found["verdict"]) == 3


def test_doctor_warns_of_a_rendezvous_on_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "8.8.8.8")
    found = {one.what: one for one in doctor.examine(Path("runs"), 300)}
    assert "8.8.8.8" in found["rendezvous"].found and "firewall" in found["rendezvous"].mend


def test_emitted_files_are_what_launchers_read(tmp_path: Path) -> None:
    script = launch_file(Launcher.SLURM, JOB)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --nodes=2" in script and "a b.yaml" in script
    service, job = yaml.safe_load_all(launch_file(Launcher.K8S, JOB))
    assert service["metadata"]["name"] == job["metadata"]["name"] == "my-run-1"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == "my-run-1"
    assert "--master-addr=my-run-1-0.my-run-1" in pod["containers"][0]["command"][2]
    task = yaml.safe_load(launch_file(Launcher.SKYPILOT, JOB))
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert task["resources"] == {"accelerators": "H100:4"}
    settings = yaml.safe_load(launch_file(Launcher.ACCELERATE, JOB))
    assert settings["num_processes"] == 8


def test_emit_overwrites_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    save_config(config_in(tmp_path), config)
    out = tmp_path / "job.sh"
    assert f"sbatch {out}" in cli("emit", "slurm", config, "--out", out).output
    assert isinstance(cli("emit", "slurm", config, "--out", out).exception, ConfigError)
    assert "--image" in str(cli("emit", "k8s", config).exception)
