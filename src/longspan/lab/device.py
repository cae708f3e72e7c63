"""Devices of fixed speed and memory: a cgroup a rank, of version 1 or 2.

A share of a core is a CPU quota over a short period. Running out of memory is a real kill.
"""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from longspan.errors import LabError
from longspan.lab.spec import LabSpec

__all__ = ["Cgroups", "Device", "find_cgroups", "make_devices", "remove_devices"]

# The shortest whose share the kernel keeps to at 250 ticks a second: with longer ones a device is
# now fast, now still; with 2 ms a share of 0.45 was 0.37.
PERIOD_US = 10_000


@dataclass(frozen=True, slots=True)
class Cgroups:
    """Where this machine keeps the cpu and memory controllers, and their version (1 or 2)."""

    version: int
    cpu: Path
    memory: Path

    @property
    def roots(self) -> tuple[Path, ...]:
        """Each hierarchy once."""
        return tuple(dict.fromkeys((self.cpu, self.memory)))


@dataclass(frozen=True, slots=True)
class Device:
    """The cgroup of one rank: one folder in version 2, two in version 1."""

    cgroups: Cgroups
    folder: str

    @property
    def entries(self) -> tuple[Path, ...]:
        """The files that take the id of a process that is to run on this device."""
        return tuple(root / self.folder / "cgroup.procs" for root in self.cgroups.roots)

    def memory_kills(self) -> int:
        """How many processes were killed for want of memory."""
        name = "memory.oom_control" if self.cgroups.version == 1 else "memory.events"
        lines = (self.cgroups.memory / self.folder / name).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def find_cgroups(mounts: Path = Path("/proc/mounts")) -> Cgroups:
    """The mounted hierarchies; raises LabError if there is none with cpu and memory."""
    found: dict[str, Path] = {}
    for line in mounts.read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup":
            found |= {name: Path(where) for name in ("cpu", "memory") if name in options.split(",")}
        elif kind == "cgroup2":
            with suppress(OSError):
                if {"cpu", "memory"} <= set(
                    (Path(where) / "cgroup.controllers").read_text().split()
                ):
                    return Cgroups(2, Path(where), Path(where))
    if not {"cpu", "memory"} <= set(found):
        raise LabError(
            "devices can't be limited here: no cgroup hierarchy has the cpu and memory"
            " controllers; leave out device_share and device_memory"
        )
    return Cgroups(1, found["cpu"], found["memory"])


def make_devices(lab: str, spec: LabSpec, cgroups: Cgroups | None = None) -> list[Device]:
    """A device for every rank, or none at all if nothing limits them.

    Raises LabError if the shares add up to more cores than there are, or cgroups can't be made.
    """
    if spec.device_share is None and spec.device_memory is None:
        return []
    shares = [spec.share_of(node) for node in range(spec.nodes) for _ in range(spec.ranks)]
    wanted, cores = sum(share or 0 for share in shares), len(os.sched_getaffinity(0))
    if wanted > cores + 1e-9:
        raise LabError(
            f"{spec.world} devices of together {wanted:g} cores don't fit this machine's {cores}:"
            f" a device_share of {cores / spec.world:.2g} would"
        )
    cgroups = cgroups or find_cgroups()
    devices = []
    try:
        if cgroups.version == 2:
            _delegate(cgroups.cpu)
            (cgroups.cpu / f"longspan-{lab}").mkdir(exist_ok=True)
            _delegate(cgroups.cpu / f"longspan-{lab}")
        for rank, share in enumerate(shares):
            device = Device(cgroups, f"longspan-{lab}/rank{rank}")
            for root in cgroups.roots:
                (root / device.folder).mkdir(parents=True)
            _limit(device, share, spec.memory_of(rank // spec.ranks))
            devices.append(device)
    except OSError as error:
        raise LabError(
            f"devices can't be limited here: {error.filename}: {error.strerror};"
            f" leave out device_share and device_memory, or give the container its cgroups"
        ) from None
    return devices


def _delegate(folder: Path) -> None:
    """Let the cgroups below ``folder`` have cpu and memory limits (version 2)."""
    switch = folder / "cgroup.subtree_control"
    if not {"cpu", "memory"} <= set(switch.read_text().split()):
        switch.write_text("+cpu +memory")


def _limit(device: Device, share: float | None, memory: int | None) -> None:
    cpu, ram = (root / device.folder for root in (device.cgroups.cpu, device.cgroups.memory))
    # Version 1 refuses a quota under 1 ms.
    period = PERIOD_US if share is None else max(PERIOD_US, round(1000 / share))
    if device.cgroups.version == 1:
        if share is not None:
            (cpu / "cpu.cfs_period_us").write_text(str(period))
            (cpu / "cpu.cfs_quota_us").write_text(str(round(share * period)))
        if memory is not None:
            (ram / "memory.limit_in_bytes").write_text(str(memory))
            with suppress(OSError):  # a kernel that doesn't count swap
                (ram / "memory.memsw.limit_in_bytes").write_text(str(memory))
        return
    if share is not None:
        (cpu / "cpu.max").write_text(f"{round(share * period)} {period}")
    if memory is not None:
        (ram / "memory.max").write_text(str(memory))
        if (ram / "memory.swap.max").exists():
            (ram / "memory.swap.max").write_text("0")


def remove_devices(lab: str) -> None:
    """End every process on a lab's devices, and remove their cgroups.

    Raises LabError if a process won't end.
    """
    try:
        cgroups = find_cgroups()
    except LabError:
        return
    for root in cgroups.roots:
        top = root / f"longspan-{lab}"
        for folder in [*sorted(top.glob("rank*")), top]:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Killed processes leave their cgroup a little later, so try for a while."""
    for _ in range(500):
        with suppress(FileNotFoundError, ProcessLookupError):
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise LabError(f"{folder} can't be removed: processes in it don't end")
