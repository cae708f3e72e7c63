"""Starts one process a rank on this machine, with torchrun's own launcher."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

__all__ = ["default_nproc", "launch"]


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``longspan`` with ``arguments`` in ``nproc`` processes; returns the exit code.

    A rank that ends with a user's error has said so: its 2 is passed on. SIGTERM and Ctrl-C are
    handed to the ranks, who save and stop.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "longspan", *arguments)
    except SignalException:
        return 0
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if 2 in codes.values():
            return 2
        # A rank that was killed takes others with it: name the cause, not what it caused.
        rank, code = min(codes.items(), key=lambda failed: failed[1])
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        print(f"longspan: rank {rank} {how}", file=sys.stderr)
        return 1
    return 0


def default_nproc() -> int:
    """One process a GPU, or a single one."""
    return max(1, torch.cuda.device_count())
