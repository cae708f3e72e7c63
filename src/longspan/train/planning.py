"""Sets planning up: what a run is planned for, how parameters are spread, how fast the model is."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedConfig

from longspan.cluster.spec import read_cluster
from longspan.comm.agree import leaders_words
from longspan.comm.groups import Groups
from longspan.errors import ConfigError, LongspanError, MemoryLimitError, PlanError
from longspan.models.windows import layer_windows
from longspan.plan import BatchPlan
from longspan.planner.batches import plan_priced, ways_of
from longspan.planner.prices import Prices, Sharding
from longspan.planner.workload import Rates, Workload
from longspan.train.batches import Batches, Place
from longspan.train.config import Config
from longspan.train.fit import transformer_sizes
from longspan.train.planned import PlannedBatches
from longspan.train.rates import measure_rates
from longspan.train.record import Recorder
from longspan.train.step import StepRunner

__all__ = ["Planning", "shards_of"]

# Ranks that share parameters wait at every layer for the one that has most to do, which has no
# price: sharding that isn't needed for memory must gain more than this.
_AS_GOOD = 1.02


class Planning:
    """What a run's batches are planned with."""

    def __init__(self, config: Config, batches: Batches, model: PreTrainedConfig) -> None:
        ways, train = config.parallel, config.train
        assert ways.cluster and train.global_batch and ways.mode != "fixed", "inspect() has checked"
        self._config, self._batches, self._size = config, batches, train.global_batch
        windows = set(layer_windows(model))
        self._cluster = read_cluster(ways.cluster)
        self._work = Workload(
            *(self._cluster, transformer_sizes(config, model)),
            memory_limit=ways.memory_bytes,
            checkpointing=train.checkpointing,
            attention_kept=train.attention_kept,
            window=windows.pop() if len(windows) == 1 else None,
        )
        self._plan: Callable[..., BatchPlan] = partial(
            plan_priced, mode=ways.mode, longest=batches.longest_piece
        )

    def sharding(self) -> Sharding:
        """What the config says, or what is best for the first batch; the same on all ranks.

        It is one for the whole run, as parameters aren't moved between batches. Raises PlanError,
        on every rank, if that batch can't be planned.
        """
        if (wanted := self._config.parallel.sharding) != "auto":
            return wanted
        best, wrong = "", ""
        if dist.get_rank() == 0:
            try:
                best = self.best_sharding(self._batches.lengths_of(0, self._size))
            except LongspanError as error:
                wrong = str(error)
        if wrong := leaders_words(wrong):
            raise PlanError(wrong)
        return leaders_words(best)  # type: ignore[return-value]

    def best_sharding(self, lengths: tuple[int, ...]) -> Sharding:
        """What suits these lengths: whole parameters, if all else gains little."""
        plan = self._plan(lengths, ways_of(self._work))
        with suppress(MemoryLimitError):
            ways = ways_of(self._work, "none")
            self._plan((self._batches.longest_piece,), ways)  # it will come
            whole = self._plan(lengths, ways)
            if whole.seconds <= plan.seconds * _AS_GOOD:
                return "none"
        return plan.sharding

    def start(self, runner: StepRunner, sharding: Sharding, recorder: Recorder) -> PlannedBatches:
        """Measure how fast the model is, if a run before hasn't, and begin to plan."""
        train = self._config.train
        groups = Groups(runner.device.type, timeout_s=train.timeout_s)
        path = self._config.run / "rates.json"
        key = hashlib.sha256(f"{self._work} {sharding}".encode()).hexdigest()
        rates = _kept(path, key)
        if rates is None:
            rates = self._measured(runner, groups, sharding)
            if recorder.leader:
                values = {kind: asdict(rate) for kind, rate in rates.items()}
                path.write_text(json.dumps({"of": key, "rates": values}), encoding="utf-8")
                recorder.note("rates", values)
        return PlannedBatches(
            self._batches,
            groups,
            partial(self._plan, ways=ways_of(replace(self._work, rates=rates), sharding)),
            global_batch=self._size,
            ahead=train.plan_ahead,
            timeout_s=train.timeout_s,
        )

    def _measured(self, runner: StepRunner, groups: Groups, sharding: Sharding) -> dict[str, Rates]:
        training = self._batches.training
        prices = self._work.prices(sharding, reduce_once=False)
        most = min(pool.prices[0].most_tokens for pool in prices.pools if pool.prices[0].ranks == 1)
        # Gradients are whole while it's measured, so not all of the memory is used.
        tokens = min(most * 3 // 4, 2 * self._config.data.max_length)
        alone = Place(groups.alone, "ring")
        usual = training.tokens // training.pieces
        rates = measure_rates(runner, alone, self._cluster, tokens, usual)
        # What was measured has gathered parameters, too, which has a price of its own; gradients
        # weren't reduced.
        work = replace(self._work, rates=rates)
        gather_s = 0.0 if prices.overlap else work.state(sharding, reduce_once=True).gather_s()
        plan_s = self._planning_s(ways_of(work, sharding)) if runner.device.type == "cpu" else 0.0
        return {
            kind: replace(
                rate, micro_batch_s=max(0.0, rate.micro_batch_s - gather_s), plan_s=plan_s
            )
            for kind, rate in rates.items()
        }

    def _planning_s(self, ways: Sequence[Prices]) -> float:
        """Seconds of a plan while all ranks compute: a CPU that plans can't train meanwhile."""
        first, *others = (self._batches.lengths_of(n * self._size, self._size) for n in range(3))
        self._plan(first, ways)
        dist.barrier()
        start = time.perf_counter()
        for lengths in others:
            self._plan(lengths, ways)
        return (time.perf_counter() - start) / len(others)


def _kept(path: Path, key: str) -> dict[str, Rates] | None:
    """What an earlier start of the run has measured, so that it goes on with the same plans."""
    words = ""
    if dist.get_rank() == 0 and path.is_file():
        words = path.read_text(encoding="utf-8")
    try:
        kept = json.loads(leaders_words(words))
        if kept["of"] == key:
            return {kind: Rates(**values) for kind, values in kept["rates"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


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
