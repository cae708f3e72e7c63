"""Exports a checkpoint as a Hugging Face folder: safetensors, config, tokenizer."""

import shutil
import warnings
from pathlib import Path

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from longspan.data.tokens import load_tokenizer
from longspan.errors import CheckpointError, ConfigError
from longspan.train.config import load_config
from longspan.train.manifest import damage, run_of
from longspan.train.parallelize import build_model

__all__ = ["export"]


def export(checkpoint: Path, out: Path) -> int:
    """Write the weights of ``checkpoint`` (a folder step-… of a run) to the new folder ``out``.

    Of a run on several sites they are the global parameters.
    ``AutoModelForCausalLM.from_pretrained(out)`` reads it. Returns the number of parameters.
    Raises CheckpointError for a damaged checkpoint, ConfigError where ``out`` holds something.
    """
    if wrong := damage(checkpoint):
        raise CheckpointError(f"{checkpoint}: {wrong}; export another one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name a new folder")
    config = load_config(run_of(checkpoint) / "config.yaml")
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_token)
    model = build_model(config, tokenizer.vocab_size, "cpu")
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    # Tied weights are stored once, buffers that aren't learnt not at all.
    weights = {}
    for name, weight in model.state_dict().items():
        agreed = f"outer.theta.{name}"
        place = agreed if agreed in stored else f"model.{name}"
        if place in stored:
            weights[place] = weight
    with warnings.catch_warnings():
        # That there is one process only is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(weights, storage_reader=reader, no_dist=True)
    part = out.with_name(f".{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if config.data.tokenizer:
        shutil.copy(config.data.tokenizer, part / "tokenizer.json")
    if out.exists():
        out.rmdir()
    part.replace(out)
    return model.num_parameters()
