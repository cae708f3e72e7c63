"""The errors that a user of longspan can meet.

Each says in one line what is wrong, where, and how to mend it; the command line prints that
line and exits with code 2.

    LongspanError
    ├── ConfigError       a setting is unknown, missing or impossible
    ├── DataError         the documents can't be read or used
    ├── LayoutError       a tensor, mesh or order doesn't fit together
    ├── ModelError        a model asks for what can't be honoured exactly
    ├── LeakError         information crosses documents or flows back in time
    ├── ClusterError      a cluster's description is wrong, or lacks what is asked of it
    ├── ScheduleError     schedules that can't be played together
    ├── PlanError         a batch can't be planned, or its planner fails
    ├── MemoryLimitError  the job doesn't fit the device
    ├── LabError          the emulated cluster can't be built, reached or run
    ├── CheckpointError   a checkpoint is missing, damaged or of another run
    ├── ExchangeError     an exchange between sites failed or took too long
    ├── UnreachableError  sites meet, but don't reach each other
    └── DivergenceError   sites that must agree don't
"""

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "ExchangeError",
    "LabError",
    "LayoutError",
    "LeakError",
    "LongspanError",
    "MemoryLimitError",
    "ModelError",
    "PlanError",
    "ScheduleError",
    "UnreachableError",
]


class LongspanError(Exception):
    """Base of all errors that name a mistake outside longspan's own code."""


class ConfigError(LongspanError):
    """A setting is unknown, missing or impossible."""


class DataError(LongspanError):
    """The documents can't be read or used."""


class LayoutError(LongspanError):
    """A tensor, a mesh or an order doesn't fit together."""


class ModelError(LongspanError):
    """A model asks for something that can't be honoured exactly."""


class LeakError(LongspanError):
    """Information crosses from one document to another, or from future to past."""


class ClusterError(LongspanError):
    """A cluster's description is wrong, or lacks what is asked of it."""


class ScheduleError(LongspanError):
    """The schedules of several ranks can't be played together: they deadlock or don't match."""


class PlanError(LongspanError):
    """A batch can't be planned, or the process that plans it fails again and again."""


class MemoryLimitError(LongspanError):
    """The job doesn't fit the memory of a device."""


class LabError(LongspanError):
    """The emulated cluster can't be built on this machine, reached, or run."""


class CheckpointError(LongspanError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ExchangeError(LongspanError):
    """An exchange between sites failed, or took too long."""


class UnreachableError(LongspanError):
    """Sites reach the place where they meet, but not each other."""


class DivergenceError(LongspanError):
    """Sites that must agree don't: they have drifted apart, or were set up differently."""
