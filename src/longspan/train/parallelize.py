"""Builds the model of a config and spreads it: attention over ``sp``, parameters over all."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longspan.comm.mesh import sharding_mesh, site_mesh
from longspan.comm.rings import use_rings
from longspan.errors import ConfigError
from longspan.models.checkpointing import checkpoint_layers
from longspan.models.transformers import patch
from longspan.train.config import Config

__all__ = ["build_model", "model_config", "parallelize"]


def model_config(config: Config, vocab_size: int) -> PreTrainedConfig:
    """The model's transformers config, its vocabulary as large as the tokenizer's.

    Raises ConfigError if it can't be made.
    """
    model = config.model
    made: PreTrainedConfig
    try:
        if model.path:
            made = AutoConfig.from_pretrained(model.path, local_files_only=True, **model.config)
        elif model.type:
            special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            values = {"vocab_size": vocab_size} | special | model.config
            made = AutoConfig.for_model(model.type, **values)
        else:
            raise ConfigError("model: give a type (such as llama) or a path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model: {' '.join(str(error).split())}") from None
    if made.vocab_size < vocab_size:
        raise ConfigError(
            f"the model knows {made.vocab_size} tokens, the tokenizer makes {vocab_size}: "
            f"set model.config.vocab_size, or give the model's own data.tokenizer"
        )
    return made


def build_model(config: Config, vocab_size: int, device: torch.device | str) -> PreTrainedModel:
    """The whole model, in float32; new weights depend on the seed alone."""
    made = model_config(config, vocab_size)
    torch.manual_seed(config.train.seed)
    model: PreTrainedModel
    try:
        if config.model.path:
            model = AutoModelForCausalLM.from_pretrained(
                config.model.path, config=made, dtype=torch.float32, local_files_only=True
            )
            model = model.to(device=device)  # type: ignore[call-arg]
        else:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {' '.join(str(error).split())}") from None
    return model


def parallelize(
    model: PreTrainedModel, config: Config, mesh: DeviceMesh, shards: int | None = None
) -> PreTrainedModel:
    """Patch the attention onto the mesh's ``sp`` and shard the parameters (FSDP2).

    ``shards``: over how many ranks, side by side; each such group has the whole model (HSDP). None:
    over all ranks; 1: every rank has the whole model. Several sites have a whole model each,
    sharded over all their ranks.

    Layers are recomputed in backward if the config says so.

    Gradients are *summed* over ranks: the loss is divided by the global count of tokens, so they
    are right as they are.
    """
    ways = config.parallel
    patch(model, mesh=mesh["sp"], order=ways.order, inside=ways.inside, grads_in=ways.grads_in)
    match config.train.checkpointing:
        case "full":
            checkpoint_layers(model)
        case "selective":
            checkpoint_layers(model, attention_kept=config.train.attention_kept)
    if config.outer.sites > 1:
        spread = site_mesh(mesh)
    else:
        spread = sharding_mesh(shards or dist.get_world_size(), mesh.device_type)
    precision: dict[str, Any] = {}
    if config.train.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        precision["mp_policy"] = policy
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=spread, **precision)
    fully_shard(model, mesh=spread, **precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without it Gloo averages, whatever the factor.
            module.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        use_rings(model)
    return model
