"""The one YAML file that says what to train, on what, and how."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from longspan.cluster.memory import Checkpointing
from longspan.errors import ConfigError

__all__ = [
    "Checkpoint",
    "Checks",
    "Config",
    "Data",
    "Model",
    "Optimizer",
    "Outer",
    "Parallel",
    "Prices",
    "Train",
    "changed_text",
    "load_config",
    "save_config",
    "settled_differences",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """The documents."""

    path: Path = Field(description="A folder of text, a .jsonl or a .parquet file.")
    field: str = Field("text", description="Where the text is in JSONL and Parquet.")
    tokenizer: Path | None = Field(None, description="A tokenizer.json; none: bytes are tokens.")
    end_token: str | None = Field(None, description="The tokenizer's end-of-document token.")
    max_length: int = Field(
        8192, ge=1, description="Most tokens of a sequence, over all its ranks."
    )
    long_documents: Literal["split", "drop", "error"] = Field(
        "split", description="What is done with documents longer than max_length."
    )
    validation_share: float = Field(0.02, gt=0, lt=1, description="Documents kept for validation.")
    cache: Path | None = Field(None, description="Where tokens are kept; none: beside the run.")


class Model(_Section):
    """A causal language model of transformers."""

    type: str | None = Field(None, description="A model type of transformers, e.g. llama.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of its config.")
    path: Path | None = Field(None, description="Instead: a folder with a model to go on from.")


class Parallel(_Section):
    """How sequences are spread; what isn't sequence parallel is data parallel."""

    sp: int | None = Field(None, ge=1, description="Ranks that share a sequence; none: all.")
    order: Literal["contiguous", "zigzag", "striped", "balanced"] = Field(
        "zigzag",
        description="Which tokens of a sequence a rank holds; balanced: by its documents.",
    )
    inside: Literal["ring", "heads"] = Field(
        "ring", description="How they attend: turn a ring, or exchange tokens for heads."
    )
    grads_in: Literal["float32", "compute"] = Field(
        "float32",
        description="What a ring's gradients travel in; compute: train.dtype, rounded at each hop.",
    )
    mode: Literal["fixed", "static", "uniform", "flexible"] = Field(
        "fixed",
        description="fixed: packed sequences, sp ranks each. Else documents are grouped by a plan: "
        "as many ranks to each group in the whole run (static), in a batch (uniform), or to each "
        "what it needs (flexible).",
    )
    cluster: str | None = Field(
        None, description="What is planned for: a YAML file that longspan probe wrote, or a preset."
    )
    sharding: Literal["auto", "world", "node", "none"] = Field(
        "auto",
        description="Over which ranks parameters are spread; auto: all, or what a plan finds best.",
    )
    memory_bytes: ByteSize | None = Field(
        None, gt=0, description="What a plan may use of each device; none: all of it."
    )
    strategy: str | None = Field(
        None,
        description="Split every layer in its own way, not sequences: auto plans that for the "
        "cluster, or a plan that longspan plan-layers wrote. Documents have a row each.",
    )


class Outer(_Section):
    """Sites that train apart and exchange fragments of the model now and then."""

    sites: int = Field(1, ge=1, description="How many; the ranks are dealt evenly over them.")
    sync_every: int = Field(100, ge=1, description="Steps between two exchanges of a fragment.")
    delay: int = Field(1, ge=0, description="Steps until what was exchanged is merged.")
    mix: float = Field(0.5, ge=0, le=1, description="Share of local parameters kept in a merge.")
    lr: float = Field(0.4, gt=0, description="Of the outer optimizer, SGD with Nesterov momentum.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of the outer optimizer.")
    codec: Literal["fp32", "bf16", "int8", "int4", "e3m0"] = Field(
        "e3m0", description="What outer gradients are sent as."
    )
    error_feedback: bool = Field(False, description="What codes leave out is sent the next time.")
    fragments: Literal["strided", "sequential", "balanced"] = Field(
        "strided", description="Which layers form a fragment."
    )
    fragment_layers: int = Field(3, ge=1, description="Layers of a fragment.")
    offload: bool = Field(False, description="Keep the outer optimizer's state on the CPU.")
    timeout_s: float = Field(300.0, gt=0, description="How long an exchange is waited for.")
    rendezvous: str | None = Field(
        None,
        description="host:port of longspan rendezvous: each site is a run of its own, and may be "
        "lost and come back; sites is then how many there may be.",
    )
    site: int = Field(0, ge=0, description="Which of them this run is, where there is one.")

    @property
    def together(self) -> int:
        """Sites whose ranks are in this run's process group."""
        return 1 if self.rendezvous else self.sites


class Optimizer(_Section):
    """AdamW with warm-up and cosine decay."""

    lr: float = Field(3e-4, gt=0, description="The learning rate after warm-up.")
    final_lr_share: float = Field(0.1, ge=0, le=1, description="What is left of it at the end.")
    warmup_steps: int = Field(10, ge=0, description="Steps in which it rises from zero.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's averaging factors.")
    weight_decay: float = Field(0.1, ge=0, description="On matrices; never on norms and biases.")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")


class Checks(_Section):
    """What is proved on the model itself before the first step."""

    leak_probe: bool = Field(True, description="No token sees another document or its future.")
    exactness: bool = Field(False, description="Loss and gradients equal those of one process.")


class Train(_Section):
    """The run."""

    steps: int = Field(description="Optimizer steps.", ge=1)
    accumulate: int = Field(1, ge=1, description="Sequences a data-parallel rank sums in a step.")
    global_batch: int | None = Field(
        None,
        ge=1,
        description="Documents in a step, where parallel.mode isn't fixed, or with a strategy.",
    )
    plan_ahead: int = Field(2, ge=0, description="Steps that are planned before they're due.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What is computed in; weights and sums are kept in float32."
    )
    checkpointing: Checkpointing = Field(
        "none",
        description="Activations computed again in backward instead of kept: none, a layer's all "
        "(full), or all but attention's output for the attention_kept share (selective).",
    )
    attention_kept: float = Field(
        0.5, ge=0, le=1, description="Of a sequence's tokens, the last ones, if selective."
    )
    seed: int = Field(0, ge=0, description="Of weights, shuffling and dropout.")
    validate_every: int = Field(50, ge=1, description="Steps between validations.")
    validation_sequences: int = Field(8, ge=1, description="Sequences in a validation.")
    timeout_s: float = Field(300.0, gt=0, description="How long a silent peer is waited for.")


class Checkpoint(_Section):
    """What is kept to go on from."""

    every: int = Field(100, ge=1, description="Steps between checkpoints; the last is always kept.")
    keep: int = Field(2, ge=2, description="How many are kept: the newest might be damaged.")


class Prices(_Section):
    """What running costs, so that a plan and a report can say what is saved."""

    currency: str = Field("JPY", max_length=8, description="Of the prices.")
    device_hour: float = Field(400.0, ge=0, description="Of an hour of a device.")
    device_kw: float = Field(1.0, ge=0, description="Power of a device, with cooling and all.")
    kwh: float = Field(30.0, ge=0, description="Of a kWh.")


class Config(_Section):
    """A whole run; its files are in ``runs/name``."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder in runs/."
    )
    runs: Path = Field(Path("runs"), description="Where runs are kept.")
    data: Data
    model: Model
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    outer: Outer = Outer()
    train: Train
    checks: Checks = Checks()
    checkpoint: Checkpoint = Checkpoint()
    prices: Prices = Prices()

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.runs / self.name


# What may change when a run is continued; all else would make it another run.
_FREE = {
    "data.cache",
    "outer.offload",
    "outer.rendezvous",
    "outer.timeout_s",
    "parallel.cluster",
    "parallel.memory_bytes",
    "parallel.sharding",
    "runs",
    "train.attention_kept",
    "train.checkpointing",
    "train.plan_ahead",
    "train.steps",
    "train.timeout_s",
    "train.validate_every",
}
_FREE_SECTIONS = {"checkpoint", "checks", "prices"}


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a config; ``overrides`` are settings like ``train.steps=200``.

    Raises ConfigError: no file, no YAML, an unknown key (with the nearest known one), a value
    that can't be.
    """
    if not path.is_file():
        raise ConfigError(f"no config at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        changes = [(key, yaml.safe_load(value)) for key, value in map(_halves, overrides)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings, such as 'train: {{steps: 100}}'")
    for key, value in changes:
        _set(values, key.split("."), value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_in_words(error)}") from None


def changed_text(path: Path, settings: Mapping[str, Any]) -> str:
    """The YAML of the config at ``path`` with ``settings`` such as ``parallel.sp``; None: left out.

    Comments are lost. The file must be one that ``load_config`` has read.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        *sections, name = key.split(".")
        if value is not None:
            _set(values, [*sections, name], value)
            continue
        inner = values
        for section in sections:
            inner = inner.get(section) or {}
        inner.pop(name, None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path) -> None:
    """Write a config as YAML that ``load_config`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path.write_text(text, encoding="utf-8")


def settled_differences(old: Config, new: Config) -> list[str]:
    """Settings that differ although a continued run must keep them, as ``key: old -> new``."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in _FREE
        and key.split(".")[0] not in _FREE_SECTIONS
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _halves(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    return key, value


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {'.'.join(keys)}: {key} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _in_words(error: ValidationError) -> str:
    """The first mistake, in one line."""
    mistake = error.errors()[0]
    place = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "missing":
        return f"{place} is missing"
    if mistake["type"] != "extra_forbidden":
        return f"{place} is {mistake['input']!r}: {mistake['msg']}"
    section: Any = Config
    for key in mistake["loc"][:-1]:
        section = section.model_fields[str(key)].annotation
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"unknown setting {place}: {hint}"
