"""Finds what would go wrong in a run before any process is started."""

import torch

from longspan.cluster.spec import read_cluster
from longspan.comm.mesh import ranks_of_a_site
from longspan.elastic.membership import host_and_port
from longspan.errors import ConfigError
from longspan.models.transformers import check_model
from longspan.train.batches import Batches
from longspan.train.config import Config, load_config, save_config, settled_differences
from longspan.train.fit import check_memory, device_memory_bytes
from longspan.train.parallelize import build_model
from longspan.train.sites import outer_bytes
from longspan.train.strategy import check_strategy

__all__ = ["claim_run", "inspect"]


def inspect(config: Config, world: int, local_world: int) -> None:
    """Check settings, documents, model and memory for ``world`` ranks; tokenise the documents.

    ``local_world`` of the ranks share this machine's memory.

    Raises the LongspanError of the first thing that is wrong.
    """
    inside = ranks_of_a_site(world, config.parallel.sp, config.outer.together)
    _check_mode(config, world)
    batches = Batches(config)
    batches.check(world // (config.parallel.sp or inside))
    model = build_model(config, batches.tokenizer.vocab_size, "meta")
    check_model(model)
    apart = config.outer.offload and torch.cuda.is_available()  # where ranks' memory is a GPU's
    outer = 0 if apart else outer_bytes(config.outer, model, inside)
    room = device_memory_bytes(local_world)
    if not config.parallel.strategy:  # whose memory is planned
        check_memory(config, model.config, batches.longest, inside, room, outer)
    _check_kept(config)


def claim_run(config: Config) -> None:
    """Keep the config in the run's folder; ConfigError if another run lives there."""
    _check_kept(config)
    save_config(config, config.run / "config.yaml")


def _check_mode(config: Config, world: int) -> None:
    """Settings that go together: what a plan needs, and what only it uses."""
    ways, train, outer = config.parallel, config.train, config.outer
    if outer.rendezvous:
        host_and_port(outer.rendezvous)
    if outer.rendezvous and not outer.site < outer.sites > 1:
        raise ConfigError(
            f"outer.site is {outer.site} of {outer.sites} that meet at outer.rendezvous: set "
            "outer.sites to the most there may be, 2 at least, and count them from 0"
        )
    if ways.strategy:
        check_strategy(config, world)
        return
    if outer.sites > 1 and (ways.mode != "fixed" or ways.sharding not in ("auto", "world")):
        raise ConfigError(
            "outer.sites is more than 1: a site spreads its parameters over all its ranks, and "
            "its steps aren't planned; leave parallel.mode and parallel.sharding out"
        )
    if ways.mode == "fixed":
        if train.global_batch is not None:
            raise ConfigError(
                "train.global_batch is for planned steps: set parallel.mode to static, uniform or "
                "flexible, or use train.accumulate"
            )
        return
    if ways.cluster is None:
        raise ConfigError(
            f"parallel.mode {ways.mode} plans for a cluster: run longspan probe, and set "
            "parallel.cluster to the file it writes"
        )
    if (found := read_cluster(ways.cluster).ranks) != world:
        raise ConfigError(
            f"parallel.cluster {ways.cluster} has {found} devices, but there are {world} "
            "processes: probe with as many"
        )
    if train.global_batch is None:
        raise ConfigError(f"parallel.mode {ways.mode} needs train.global_batch, documents a step")
    if train.accumulate != 1:
        raise ConfigError(f"train.accumulate is the plan's to choose in mode {ways.mode}: leave it")
    if ways.sp is not None:
        raise ConfigError(f"parallel.sp is the plan's to choose in mode {ways.mode}: leave it out")


def _check_kept(config: Config) -> None:
    kept = config.run / "config.yaml"
    if kept.is_file() and (differences := settled_differences(load_config(kept), config)):
        raise ConfigError(
            f"{config.run} holds a run with other settings ({differences[0]}): "
            "choose another name, or move that folder away"
        )
