"""The command ``longspan emit``: what other launchers need to start a run with torchrun."""

import shlex
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.errors import ConfigError

__all__ = ["Job", "Launcher", "emit", "launch_file"]

_PORT = 29500


class Launcher(StrEnum):
    """What starts processes on a cluster."""

    SLURM = "slurm"
    K8S = "k8s"
    SKYPILOT = "skypilot"
    ACCELERATE = "accelerate"


@dataclass(frozen=True)
class Job:
    """A run on ``nodes`` machines, ``ranks`` processes on each: one a GPU."""

    name: str
    config: Path
    nodes: int
    ranks: int
    gpu: str
    image: str
    hours: int


def emit(
    launcher: Annotated[Launcher, typer.Argument(help="For which launcher.")],
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on each: one a GPU.")] = 8,
    gpu: Annotated[str, typer.Option(help="SkyPilot's name of the GPU.")] = "H100",
    image: Annotated[str, typer.Option(help="Kubernetes: an image that holds longspan.")] = "",
    hours: Annotated[int, typer.Option(min=1, help="Slurm: the longest time.")] = 24,
    out: Annotated[Path | None, typer.Option(help="A new file; none: print it.")] = None,
) -> None:
    """Write the file that starts a run by Slurm, Kubernetes, SkyPilot or accelerate.

    What it starts is ``torchrun … -m longspan train``; a run that is started again goes on from its
    newest checkpoint.
    """
    from longspan.train.config import load_config

    settings = load_config(config)
    if launcher is Launcher.K8S and not image:
        raise ConfigError("emit k8s: name an image that holds longspan with --image")
    text = launch_file(launcher, Job(settings.name, config, nodes, ranks, gpu, image, hours))
    if out is None:
        print(text, end="")
    elif out.exists():
        raise ConfigError(f"{out} is there already: name another with --out")
    else:
        out.write_text(text, encoding="utf-8")
        starts = {
            Launcher.SLURM: f"sbatch {shlex.quote(str(out))}",
            Launcher.K8S: f"kubectl apply -f {shlex.quote(str(out))}",
            Launcher.SKYPILOT: f"sky launch {shlex.quote(str(out))}",
            Launcher.ACCELERATE: _accelerate_command(out, config),
        }
        print(f"Start it with: {starts[launcher]}")


def launch_file(launcher: Launcher, job: Job) -> str:
    """The file's text."""
    import yaml

    if launcher is Launcher.SLURM:
        return _slurm(job)
    documents: list[dict[str, Any]] = {
        Launcher.K8S: _k8s,
        Launcher.SKYPILOT: _skypilot,
        Launcher.ACCELERATE: _accelerate,
    }[launcher](job)
    return "---\n".join(yaml.safe_dump(one, sort_keys=False) for one in documents)


def _torchrun(job: Job, address: str, node: str) -> str:
    """``address`` and ``node``: the shell's words for the first node and this one's number."""
    return (
        f"torchrun --nnodes={job.nodes} --nproc-per-node={job.ranks} --node-rank={node} "
        f"--master-addr={address} --master-port={_PORT} "
        f"-m longspan train {shlex.quote(str(job.config))}"
    )


def _slurm(job: Job) -> str:
    # The port follows from the job's number, so that two jobs of a node don't meet.
    command = _torchrun(job, '"$first"', '"$SLURM_NODEID"').replace(
        f"--master-port={_PORT}", '--master-port="$port"'
    )
    return f"""#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.ranks}
#SBATCH --time={job.hours}:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
# 120 s before the time is up every rank is told to save; a requeued job goes on from there.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export first port
srun bash -c {shlex.quote("exec " + command)}
"""


def _k8s(job: Job) -> list[dict[str, Any]]:
    name = job.name.lower().replace("_", "-").replace(".", "-")
    command = "exec " + _torchrun(job, f"{name}-0.{name}", '"$JOB_COMPLETION_INDEX"')
    container = {
        "name": "train",
        "image": job.image,
        "command": ["bash", "-c", command],
        "resources": {"limits": {"nvidia.com/gpu": job.ranks}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"clusterIP": "None", "selector": {"job-name": name}},
    }
    spec = {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 3 * job.nodes,
        "template": {"spec": pod},
    }
    batch = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
    return [service, batch]


def _skypilot(job: Job) -> list[dict[str, Any]]:
    address, node = '"$(echo "$SKYPILOT_NODE_IPS" | head -n1)"', '"$SKYPILOT_NODE_RANK"'
    task = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{job.gpu}:{job.ranks}"},
        "workdir": ".",
        "setup": "pip install longspan",
        "run": _torchrun(job, address, node),
    }
    return [task]


def _accelerate(job: Job) -> list[dict[str, Any]]:
    # longspan shards by itself: accelerate is only to start the processes.
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if job.nodes * job.ranks > 1 else "NO",
        "mixed_precision": "no",
        "num_machines": job.nodes,
        "num_processes": job.nodes * job.ranks,
        "machine_rank": 0,
        "main_process_ip": "127.0.0.1" if job.nodes == 1 else "FIRST_NODE",
        "main_process_port": _PORT,
        "rdzv_backend": "static",
        "same_network": True,
    }
    return [settings]


def _accelerate_command(out: Path, config: Path) -> str:
    return (
        f"accelerate launch --config_file {shlex.quote(str(out))} "
        f"-m longspan train {shlex.quote(str(config))}"
    )
