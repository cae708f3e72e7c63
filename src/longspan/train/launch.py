"""Starts one process a rank on this machine, with torchrun's own launcher.

Ranks are forks of one process that has imported what they need, and done nothing else.
"""

import logging
import os
import sys
import traceback
import uuid
from collections.abc import Callable
from multiprocessing import forkserver, get_context

from longspan.errors import LongspanError
from longspan.report.words import clean

__all__ = ["default_nproc", "launch", "prepare", "within_torchrun"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def within_torchrun() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return all(name in os.environ for name in _ENVIRONMENT)


def prepare() -> None:
    """Start to import what ranks need, beside what this process has to do before it launches."""
    get_context("forkserver").set_forkserver_preload(["longspan.train.worker"])
    forkserver.ensure_running()


def launch(work: Callable[[], int], nproc: int) -> int:
    """Do ``work``, which returns its exit code, in ``nproc`` processes; returns the exit code.

    A rank that ends with a user's error has said so: its 2 is passed on. SIGTERM and Ctrl-C are
    handed to the ranks, who save and stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    prepare()
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
        start_method="forkserver",
    )
    try:
        elastic_launch(settings, _rank)(work)
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


def _rank(work: Callable[[], int]) -> None:
    """A rank's part. One that ends well returns: torchrun waits for that."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        code = work()
    except LongspanError as error:
        print(f"longspan: {clean(error)}", file=sys.stderr)
        code = 2
    except Exception:  # torchrun would keep it to itself
        traceback.print_exc()
        code = 1
    if code:
        sys.exit(code)


def default_nproc() -> int:
    """One process a GPU, or a single one."""
    import torch

    return max(1, torch.cuda.device_count())
