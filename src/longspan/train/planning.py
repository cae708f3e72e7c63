"""Sets planning up for a run: what is planned for, how parameters are spread, how fast the model is."""

import os
from functools import partial

import torch.distributed as dist
from transformers import PreTrainedConfig

from longspan.cluster.spec import read_cluster
from longspan.comm.agree import leaders_words
from longspan.comm.groups import Groups
from longspan.errors import ConfigError, LongspanError, PlanError
from longspan.planner.batches import plan_batch
from longspan.train.batches import Batches
from longspan.train.config import Config
from longspan.train.fit import transformer_sizes
from longspan.train.planned import PlannedBatches
from longspan.train.step import StepRunner

__all__ = ["Planning", "shards_of"]


class Planning:
    """What a run's batches are planned with."""

    def __init__(self, config: Config, batches: Batches, model: PreTrainedConfig) -> None:
        self._config, self._batches = config, batches
        assert config.parallel.cluster and config.train.global_batch, "inspect() has asked for them"
        self.cluster = read_cluster(config.parallel.cluster)
        self._size = config.train.global_batch
        self._plan = partial(
            plan_batch,
            cluster=self.cluster,
            model=transformer_sizes(config, model),
            memory_limit=config.parallel.memory_bytes,
            mode=config.parallel.mode,
        )

    def sharding(self) -> str:
        """What the config says, or what is best for the first batch; the same on all ranks.

        It is one for the whole run, as parameters aren't moved between batches.
        """
        wanted = self._config.parallel.sharding
        if wanted != "auto":
            return wanted
        found = ""
        if dist.get_rank() == 0:
            try:
                lengths = tuple(p.length for p in self._batches.documents_of(0, self._size))
                found = self._plan(lengths).sharding
            except LongspanError as error:
                found = f"!{error}"
        found = leaders_words(found)
        if found.startswith("!"):
            raise PlanError(found[1:])
        return found

    def start(self, runner: StepRunner, sharding: str) -> PlannedBatches:
        """Measure the model's pace, and begin to plan."""
        groups = Groups(runner.device.type)
        plan = partial(self._plan, sharding=sharding)
        train = self._config.train
        return PlannedBatches(
            self._batches,
            groups,
            plan,
            global_batch=self._size,
            ahead=train.plan_ahead,
            timeout_s=train.timeout_s,
        )


def shards_of(sharding: str, config: Config) -> int:
    """Over how many ranks, side by side, parameters are spread.

    Raises ConfigError for nodes that aren't alike.
    """
    if sharding == "none":
        return 1
    if sharding != "node":
        return dist.get_world_size()
    if config.parallel.cluster is None:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    sizes = {sum(node.devices.values()) for node in read_cluster(config.parallel.cluster).nodes}
    if len(sizes) > 1:
        raise ConfigError(
            f"parallel.sharding node: the nodes of {config.parallel.cluster} have "
            f"{' or '.join(map(str, sorted(sizes)))} devices: use world or none"
        )
    return sizes.pop()
