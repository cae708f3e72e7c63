"""Looks at this machine the way a run will: versions, devices, network, disk, clock."""

import contextlib
import ipaddress
import os
import platform
import resource
import shutil
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "examine"]

_PACKAGES = ("longspan", "torch", "transformers", "safetensors", "numpy")
_DISK_BYTES = 20 << 30
_OPEN_FILES = 4096
_DRIFT_S = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``mend`` is empty where there is nothing to do."""

    what: str
    found: str
    level: Literal["fine", "advice", "blocked"] = "fine"
    mend: str = ""


def examine(runs: Path, timeout_s: float) -> list[Finding]:
    """All findings; ``runs`` is where runs are to be kept, ``timeout_s`` the wait for a peer."""
    return [
        Finding("python", platform.python_version()),
        *_packages(),
        *_devices(),
        _backend(),
        *_interfaces(),
        _rendezvous(),
        _timeout(timeout_s),
        _disk(runs),
        _shared_memory(),
        _files(),
        _allocator(),
        _clock(),
    ]


def _packages() -> list[Finding]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(Finding(name, version(name)))
        except PackageNotFoundError:
            mend = f"pip install {name}"
            found.append(Finding(name, "not installed", "blocked", mend))
    return found


def _devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        kinds = sorted(set(names))
        found = f"{len(names)} × {', '.join(kinds)}"
        if len(kinds) > 1:
            mend = "give every kind its own rate: longspan probe measures them"
            return [Finding("devices", found, "advice", mend)]
        return [Finding("devices", found), Finding("processor cores", str(cores))]
    if list(Path("/dev").glob("nvidia[0-9]*")):
        mend = f"torch {torch.__version__} can't use them: install a CUDA build of torch"
        return [Finding("devices", "GPUs that torch doesn't see", "blocked", mend)]
    mend = "fine for trying things out; training in earnest wants GPUs"
    return [Finding("devices", f"no GPU, {cores} processor cores", "advice", mend)]


def _backend() -> Finding:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        if dist.is_nccl_available():
            return Finding("backend", "NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
        return Finding("backend", "no NCCL", "blocked", "install a torch build with NCCL")
    if dist.is_gloo_available():
        return Finding("backend", "Gloo")
    return Finding("backend", "none", "blocked", "install a torch build with Gloo")


def _interfaces() -> list[Finding]:
    """Gloo takes the interface that the host's name leads to: often the loopback."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    present = [name for _, name in socket.if_nameindex()]
    if named:
        if named in present:
            return [Finding("network interface", named)]
        mend = f"set GLOO_SOCKET_IFNAME to one of {', '.join(present)}"
        return [Finding("network interface", f"no {named}", "blocked", mend)]
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        mend = "set GLOO_SOCKET_IFNAME to one of " + ", ".join(present)
        return [Finding("network interface", "this host's name has no address", "advice", mend)]
    if ipaddress.ip_address(address).is_loopback and len(present) > 1:
        others = ", ".join(name for name in present if name != "lo")
        mend = f"for several machines set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME): {others}"
        return [Finding("network interface", f"the host's name is {address}", "advice", mend)]
    return [Finding("network interface", f"the one of {address}")]


def _rendezvous() -> Finding:
    """torch's store has no password and listens on every interface."""
    host, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "29500"))
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError:
        mend = f"something uses port {port}: torchrun --master-port another"
        return Finding("rendezvous port", str(port), "advice", mend)
    if public := _public_addresses(host):
        mend = f"the rendezvous has no password: close port {port} to the world with a firewall"
        return Finding("rendezvous", f"on {', '.join(public)}, public", "advice", mend)
    return Finding("rendezvous", f"port {port} is free, on no public address")


def _public_addresses(host: str | None) -> list[str]:
    found = set()
    for name in filter(None, (host, socket.gethostname())):
        try:
            found |= {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
        except OSError:
            continue
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp, contextlib.suppress(OSError):
        # Sends nothing: only asks which address the way out would start from.
        udp.connect(("192.0.2.1", 9))
        found.add(udp.getsockname()[0])
    return sorted(one for one in found if ipaddress.ip_address(one.split("%")[0]).is_global)


def _timeout(timeout_s: float) -> Finding:
    if timeout_s > 900:
        mend = "a silent peer holds all others as long as that: train.timeout_s=300"
        return Finding("time-out", f"{timeout_s:g} s", "advice", mend)
    return Finding("time-out", f"{timeout_s:g} s")


def _disk(runs: Path) -> Finding:
    there = next(path for path in (runs, *runs.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 1e9:,.0f} GB free for {runs}"
    if not os.access(there, os.W_OK):
        return Finding("disk", f"{there} can't be written", "blocked", "name another: runs: …")
    if free < _DISK_BYTES:
        mend = (
            "checkpoints take 12 bytes a parameter each: make room, or set runs: to a larger disk"
        )
        return Finding("disk", found, "advice", mend)
    return Finding("disk", found)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    size = shutil.disk_usage(path).total if path.exists() else 0
    if size < 1 << 30:
        mend = "NCCL needs it between GPUs of a node: docker run --shm-size=8g"
        return Finding("shared memory", f"{size / 1e6:,.0f} MB", "advice", mend)
    return Finding("shared memory", f"{size / 1e9:,.1f} GB")


def _files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        mend = f"many ranks open many connections: ulimit -n {_OPEN_FILES * 4}"
        return Finding("open files", f"at most {soft}", "advice", mend)
    return Finding("open files", f"at most {soft}")


def _allocator() -> Finding:
    import torch

    set_ = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    if torch.cuda.is_available() or set_:
        return Finding("allocator", f"MALLOC_MMAP_THRESHOLD_={set_}" if set_ else "CUDA's")
    mend = "on CPU glibc keeps what is freed: export MALLOC_MMAP_THRESHOLD_=262144"
    return Finding("allocator", "glibc's defaults", "advice", mend)


def _clock() -> Finding:
    """Whether the kernel says that its clock is kept right, by NTP or the hypervisor."""
    import ctypes

    # struct timex starts with modes (int, padded), offset, freq, maxerror, esterror (long), status.
    fields = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex") or libc.adjtimex(fields) < 0:
        return Finding("clock", "the kernel doesn't tell", "advice", "run an NTP client")
    off_s = fields[3] / 1e6
    if off_s > _DRIFT_S:
        mend = "traces of several machines won't line up: run an NTP client (chrony)"
        return Finding("clock", f"may be off by {off_s:.0f} s", "advice", mend)
    return Finding("clock", f"right to {1e3 * off_s:.0f} ms")
