"""Runs one command on every rank of a lab, as torchrun would, and gathers what came of it."""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TextIO

from longspan.errors import LabError
from longspan.lab.device import Device
from longspan.lab.network import LinkBytes, address, namespace
from longspan.lab.spec import LabSpec

__all__ = ["Job", "Outcome", "RankOutcome"]

TIMED_OUT = 124  # as of timeout(1)
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How a rank ended. ``exit_code`` is 128 + the signal's number if one ended it."""

    rank: int
    node: int
    exit_code: int
    stdout: str
    stderr: str
    out_of_memory: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run: every rank's end, the bytes each link carried, and the time it took.

    ``exit_code`` is that of the first rank that failed, 124 if the time was up, or 0.
    """

    ranks: tuple[RankOutcome, ...]
    links: dict[str, LinkBytes]
    seconds: float
    exit_code: int
    first_failed: int | None

    def check(self) -> "Outcome":
        """Itself; raises LabError, with the last line of the first rank that failed, if one did."""
        if self.first_failed is not None:
            rank = self.ranks[self.first_failed]
            why = "ran out of its device's memory" if rank.out_of_memory else "failed"
            said = (rank.stderr.strip() or rank.stdout.strip() or "it said nothing").splitlines()[
                -1
            ]
            raise LabError(f"rank {rank.rank} {why}, exit code {rank.exit_code}: {said}")
        if self.exit_code == TIMED_OUT:
            raise LabError(f"the ranks were stopped after {self.seconds:.1f} s: time was up")
        return self


def _environment(spec: LabSpec, rank: int, extra: Mapping[str, str]) -> dict[str, str]:
    node, local = divmod(rank, spec.ranks)
    ours = {
        "RANK": rank,
        "WORLD_SIZE": spec.world,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": spec.ranks,
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": spec.nodes,
        "LONGSPAN_SITE": f"site{spec.site_of(node)}",
        "MASTER_ADDR": address(0),
        "MASTER_PORT": 29500,
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": 1,
        "PYTHONUNBUFFERED": 1,
    }
    if memory := spec.memory_of(node):
        ours["LONGSPAN_DEVICE_BYTES"] = memory
    return {**os.environ, **{name: str(value) for name, value in ours.items()}, **extra}


class _Rank:
    """One process, and the threads that read what it says and wait for its end."""

    def __init__(
        self,
        lab: str,
        spec: LabSpec,
        rank: int,
        command: Sequence[str],
        env: Mapping[str, str],
        device: Device | None,
        echo: bool,
    ) -> None:
        self.rank = rank
        self.node, local = divmod(rank, spec.ranks)
        self.device = device
        self.kills = device.memory_kills() if device else 0
        # The shell enters the cgroup, then becomes the command, so nothing runs outside it. The
        # kernel ends the command should the lab's owner be killed.
        entries = device.entries if device else ()
        script = "".join(f"echo $$ > {shlex.quote(str(path))} && " for path in entries)
        script += f'exec setpriv --pdeathsig KILL ip netns exec {namespace(lab, self.node)} "$@"'
        self.process = subprocess.Popen(
            ["sh", "-c", script, "sh", *command],
            env=_environment(spec, rank, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        prefix = f"[{self.node}.{local}] " if rank else ""
        assert self.process.stdout and self.process.stderr
        self.stdout = _Listener(self.process.stdout, sys.stdout if echo else None, prefix)
        self.stderr = _Listener(self.process.stderr, sys.stderr if echo else None, prefix)
        self.ended_s = float("inf")
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        self.process.wait()
        self.ended_s = time.monotonic()

    def signal(self, number: int) -> None:
        """Send a signal to the process and those it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        code = self.process.returncode
        return code if code is None or code >= 0 else 128 - code

    def outcome(self) -> RankOutcome:
        self.signal(signal.SIGKILL)  # what it started and left behind
        code = self.exit_code
        assert code is not None
        out_of_memory = self.device is not None and self.device.memory_kills() > self.kills
        said = self.stdout.heard(), self.stderr.heard()
        return RankOutcome(self.rank, self.node, code, *said, out_of_memory)


class _Listener(threading.Thread):
    """Reads a pipe line by line, keeps it, and passes it on with a prefix."""

    def __init__(self, pipe: IO[bytes], target: TextIO | None, prefix: str) -> None:
        super().__init__(daemon=True)
        self._pipe, self._target, self._prefix = pipe, target, prefix
        self._lines: list[str] = []
        self.start()

    def run(self) -> None:
        # newline="" ends lines at \r too, so progress bars are seen as they move.
        with io.TextIOWrapper(self._pipe, "utf-8", errors="replace", newline="") as lines:
            for line in lines:
                self._lines.append(line)
                if self._target:
                    with suppress(BrokenPipeError, ValueError):
                        self._target.write(self._prefix + line)
                        self._target.flush()

    def heard(self) -> str:
        self.join(timeout=2)  # a process that left its group may hold the pipe open
        return "".join(self._lines)


class Job:
    """A command running on every rank of a lab."""

    def __init__(
        self,
        lab: str,
        spec: LabSpec,
        command: Sequence[str],
        *,
        devices: Sequence[Device],
        counters: Callable[[], dict[str, LinkBytes]],
        env: Mapping[str, str],
        echo: bool,
        stop_on_failure: bool,
        grace_s: float,
    ) -> None:
        if not command or isinstance(command, str):
            raise LabError(f"{command!r} is not a command: give a list of its words")
        self._counters, self._before = counters, counters()
        self._stop_on_failure, self._grace_s = stop_on_failure, grace_s
        self._start = time.monotonic()
        self._ranks: list[_Rank] = []
        try:
            for rank in range(spec.world):
                device = devices[rank] if devices else None
                self._ranks.append(_Rank(lab, spec, rank, command, env, device, echo))
        except BaseException:
            self.stop()
            raise

    @property
    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank.rank for rank in self._ranks if rank.exit_code is None]

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank and what it started: by default, kill it."""
        self._ranks[rank].signal(number)

    def stop(self) -> None:
        """Ask the ranks that still run to end, and after ``grace_s`` make them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for rank in self.running:
                self._ranks[rank].signal(number)
            self._wait_until(time.monotonic() + self._grace_s)

    def _wait_until(self, deadline: float) -> None:
        while self.running and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait for all ranks to end, and say how they did.

        When a rank fails, the others have ``grace_s`` to end by themselves before they are
        stopped, unless ``stop_on_failure`` is False. After ``timeout_s`` all are stopped.
        """
        deadline = self._start + timeout_s if timeout_s is not None else float("inf")
        first: int | None = None
        try:
            while self.running and time.monotonic() < deadline:
                first = self._failed() if first is None else first
                if first is not None and self._stop_on_failure:
                    self._wait_until(min(deadline, time.monotonic() + self._grace_s))
                    break
                time.sleep(POLL_S)
            first = self._failed() if first is None else first
            timed_out = bool(self.running) and first is None
        finally:
            self.stop()
        seconds = time.monotonic() - self._start
        ranks = tuple(rank.outcome() for rank in self._ranks)
        links = {name: now - self._before[name] for name, now in self._counters().items()}
        code = ranks[first].exit_code if first is not None else TIMED_OUT if timed_out else 0
        return Outcome(ranks, links, seconds, code, first)

    def _failed(self) -> int | None:
        """The first rank that ended badly."""
        failed = [rank for rank in self._ranks if rank.exit_code]
        return min(failed, key=lambda rank: rank.ended_s).rank if failed else None
