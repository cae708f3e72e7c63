"""Finds what would go wrong in a run before any process is started."""

from longspan.comm.mesh import ranks_of_a_site
from longspan.errors import ConfigError
from longspan.models.transformers import check_model
from longspan.train.batches import Batches
from longspan.train.config import Config, load_config, save_config, settled_differences
from longspan.train.fit import check_memory, device_memory_bytes
from longspan.train.parallelize import build_model

__all__ = ["claim_run", "inspect"]


def inspect(config: Config, world: int, local_world: int) -> None:
    """Check settings, documents, model and memory for ``world`` ranks; tokenise the documents.

    ``local_world`` of the ranks share this machine's memory.

    Raises the LongspanError of the first thing that is wrong.
    """
    inside = ranks_of_a_site(world, config.parallel.sp, config.outer.sites)
    batches = Batches(config)
    batches.check(world // (config.parallel.sp or inside))
    model = build_model(config, batches.tokenizer.vocab_size, "meta")
    check_model(model)
    check_memory(config, model.config, batches.longest, inside, device_memory_bytes(local_world))
    _check_kept(config)


def claim_run(config: Config) -> None:
    """Keep the config in the run's folder; ConfigError if another run lives there."""
    _check_kept(config)
    save_config(config, config.run / "config.yaml")


def _check_kept(config: Config) -> None:
    kept = config.run / "config.yaml"
    if kept.is_file() and (differences := settled_differences(load_config(kept), config)):
        raise ConfigError(
            f"{config.run} holds a run with other settings ({differences[0]}): "
            "choose another name, or move that folder away"
        )
