"""Which labs run on this machine, and the end of those whose owner was killed.

A lab writes a file before it makes anything and deletes it when all is gone, so whatever is left
of a killed lab has a file, whose owner no longer lives.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.errors import LabError
from longspan.lab.device import remove_devices
from longspan.lab.network import remove_network
from longspan.lab.spec import LabSpec

__all__ = ["LabState", "claim", "find_lab", "release", "running_labs", "sweep"]

FOLDER = Path("/run/longspan-lab")


@dataclass(frozen=True)
class LabState:
    """A lab's name, what it emulates, and the process that owns it."""

    name: str
    pid: int
    started: int
    spec: dict[str, Any]

    @property
    def path(self) -> Path:
        """The lab's file."""
        return FOLDER / f"{self.name}.json"

    @property
    def alive(self) -> bool:
        """Whether the owner still runs; its start time tells it from a later process."""
        return _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def claim(name: str, spec: LabSpec) -> LabState:
    """Write the file of a new lab of this process; raises LabError if the name is taken."""
    started = _started(os.getpid())
    state = LabState(name, os.getpid(), started or 0, asdict(spec))
    FOLDER.mkdir(parents=True, exist_ok=True)
    whole = FOLDER / f".{name}.{os.getpid()}"
    whole.write_text(json.dumps(asdict(state)), encoding="utf-8")
    try:
        # A link fails where the name exists, and nobody ever reads half a file.
        state.path.hardlink_to(whole)
    except FileExistsError:
        raise LabError(f"a lab called {name} runs already: choose another name") from None
    finally:
        whole.unlink()
    return state


def release(name: str) -> None:
    """Remove processes, network and devices of a lab, and then its file.

    Raises LabError if something can't be removed; the file stays, so that it is tried again.
    """
    remove_network(name)
    remove_devices(name)
    (FOLDER / f"{name}.json").unlink(missing_ok=True)


def _states() -> list[LabState]:
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        try:
            found.append(LabState(**json.loads(path.read_text(encoding="utf-8"))))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError):
            raise LabError(f"{path} is damaged: delete it") from None
    return found


def running_labs() -> list[LabState]:
    """The labs of this machine whose owner lives."""
    return [state for state in _states() if state.alive]


def sweep() -> list[str]:
    """Remove what killed labs left behind; their names."""
    dead = [state.name for state in _states() if not state.alive]
    for name in dead:
        release(name)
    return dead


def find_lab(name: str | None = None) -> LabState:
    """The running lab of that name, or the only one; raises LabError if there is no such lab."""
    labs = {state.name: state for state in running_labs()}
    names = ", ".join(labs) or "none"
    if name is None and len(labs) == 1:
        return next(iter(labs.values()))
    if name is None:
        raise LabError(
            "no lab is running" if not labs else f"several labs run ({names}): name one with --lab"
        )
    if name not in labs:
        raise LabError(f"no lab called {name} is running; running: {names}")
    return labs[name]
