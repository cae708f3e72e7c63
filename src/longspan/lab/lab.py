"""Lab: an emulated slow cluster that lives as long as a ``with`` block."""

import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from longspan.errors import LabError
from longspan.lab.device import Device, make_devices
from longspan.lab.network import LinkBytes, Network, require_network
from longspan.lab.run import Job, Outcome
from longspan.lab.spec import LabSpec
from longspan.lab.state import claim, release, sweep
from longspan.lab.units import Amount, parse_rate

__all__ = ["Lab"]

_STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], object]


class Lab:
    """An emulated cluster; it is made on entry and leaves nothing behind.

    ::

        with Lab(LabSpec(nodes=2, ranks=2, bandwidth="200mbit")) as lab:
            outcome = lab.run([sys.executable, "train.py"], timeout_s=60).check()
            print(outcome.links["node0"].sent)

    Entering raises LabError if this machine can't emulate what is asked: no root, no ``tbf`` or
    ``netem``, no cgroups, too few cores. SIGTERM and SIGHUP end the block like Ctrl-C. What a
    lab that was killed outright left behind, the next one removes.
    """

    def __init__(self, spec: LabSpec, name: str | None = None) -> None:
        self.spec = spec
        self.name = name or secrets.token_hex(3)
        if not re.fullmatch(r"[a-z0-9]{1,20}", self.name):
            raise LabError(f"{self.name!r} can't name a lab: use up to 20 of a-z and 0-9")
        self._network = Network(self.name)
        self._devices: list[Device] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        require_network(latency=self.spec.latency_s > 0 or self.spec.site_latency_s > 0)
        sweep()
        # Signals that would end the process at once are to end the block first.
        deadly = [number for number in _STOPPERS if signal.getsignal(number) is signal.SIG_DFL]
        self._handle(deadly, _leave)
        try:
            claim(self.name, self.spec)
        except BaseException:
            self._restore()
            raise
        try:
            self._devices = make_devices(self.name, self.spec)
            self._network.build(self.spec)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        # A second Ctrl-C must not stop the cleaning half way: it is heard afterwards.
        waiting: list[int] = []
        self._handle(_STOPPERS, lambda number, frame: waiting.append(number))
        try:
            release(self.name)
        finally:
            self._restore()
            for number in waiting:
                signal.raise_signal(number)

    def _handle(self, numbers: Iterable[signal.Signals], handler: _Handler) -> None:
        """Handle signals for a while; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            before = signal.getsignal(number)
            if before is not None:  # None: another language's handler, which can't be put back
                signal.signal(number, handler)
                self._handlers.setdefault(number, before)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        echo: bool = False,
        stop_on_failure: bool = True,
        grace_s: float = 3.0,
    ) -> Job:
        """Start ``command`` on every rank and return at once.

        Ranks have torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …) and
        ``env``. With ``echo`` what they print is passed on: rank 0's lines as they are, the
        others' after [node.rank]. The ranks die with the thread that started them.
        """
        return Job(
            self.name,
            self.spec,
            command,
            devices=self._devices,
            counters=self.counters,
            env=env or {},
            echo=echo,
            stop_on_failure=stop_on_failure,
            grace_s=grace_s,
        )

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        echo: bool = False,
        stop_on_failure: bool = True,
        grace_s: float = 3.0,
    ) -> Outcome:
        """Run ``command`` on every rank, as ``start`` does, and wait for its outcome."""
        job = self.start(
            command, env=env, echo=echo, stop_on_failure=stop_on_failure, grace_s=grace_s
        )
        return job.wait(timeout_s)

    def counters(self) -> dict[str, LinkBytes]:
        """Bytes on each link since the lab began: "node0", …, and "site0", … if sites > 1."""
        return self._network.counters()

    def cut(self, node: int) -> None:
        """Take a node's link down: nothing passes, and nobody is told."""
        self._network.cut(node)

    def heal(self, node: int) -> None:
        """Bring a node's link up again."""
        self._network.heal(node)

    def rate(self, node: int, bandwidth: Amount) -> None:
        """Give a node's link another rate (bits/s, or "50mbit"), both ways."""
        self._network.rate(node, parse_rate(bandwidth))


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
