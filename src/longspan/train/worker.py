"""One rank of a run, in the environment that torchrun gives it."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import parent_process
from typing import NoReturn

import torch
import torch.distributed as dist

from longspan.comm.mesh import connect
from longspan.errors import LongspanError, MemoryLimitError
from longspan.report.page import write_report
from longspan.train.config import Config
from longspan.train.inspect import claim_run, inspect
from longspan.train.job import make_job
from longspan.train.loop import train
from longspan.train.record import Recorder
from longspan.train.stop import StopWish

__all__ = ["guarded", "leave", "run_worker"]

# The launcher names the first rank that ends: that must be the one that the others have lost.
_LATER_S = 1.0
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out waiting", "Socket")


def run_worker(config: Config) -> int:
    """This rank's whole run; returns its exit code."""
    return guarded(config, lambda: _run(config))


def guarded(config: Config, work: Callable[[], object]) -> int:
    """Do this rank's work of a config; returns the exit code.

    A user's error is told in one line by the first rank that meets it: 2. A rank that loses its
    peers ends with 1, and leaves the telling to whoever knows why.
    """
    try:
        work()
    except LongspanError as error:
        _tell(str(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error):
            _tell(str(_out_of_memory(config, error)))
            return 2
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST):
            time.sleep(_LATER_S)
            return 1
        raise
    return 0


def leave(code: int) -> NoReturn:
    """End this process at once: a Gloo group that something still refers to aborts a usual exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(config: Config) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with StopWish() as wish:
        inspect(config, world, int(os.environ["LOCAL_WORLD_SIZE"]))
        if rank == 0:
            claim_run(config)
        device = connect(config.train.timeout_s)
        with Recorder(config.run, rank == 0, config.train.steps) as recorder:
            recorder.say(f"to watch it: longspan watch {shlex.quote(str(config.run))}")
            job = make_job(config, device, recorder)
            train(job, wish)
            if job.planned:
                job.planned.close()
        if rank == 0:
            print(f"report: {write_report(config.run)}")
            print(f"\nNext:\nlongspan verify {shlex.quote(str(config.run))}", flush=True)
        dist.destroy_process_group()
    if wish.heard and parent_process():
        # The launcher that has told its fork to stop waits for its end, not for its word.
        signal.raise_signal(signal.SIGTERM)


def _out_of_memory(config: Config, error: Exception) -> MemoryLimitError:
    words = " ".join(str(error).split())[:200]
    return MemoryLimitError(
        f"out of memory with data.max_length {config.data.max_length} ({words}): "
        "lower it, or use more ranks a sequence"
    )


def _tell(words: str) -> None:
    """Print a line, unless another rank has printed one."""
    if dist.is_initialized():
        first = dist.distributed_c10d._get_default_store().add("longspan/told", 1) == 1
    else:
        first = os.environ["LOCAL_RANK"] == "0"
    if first:
        print(f"longspan: {words}", file=sys.stderr, flush=True)
