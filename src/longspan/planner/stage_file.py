"""Stages described in YAML: what a user writes for ``longspan plan-stages``."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from longspan.errors import ConfigError
from longspan.planner.stage import Stage, transformer_block

__all__ = ["StageText", "StagesText", "examples", "read_stages"]

Sizes = dict[str, PositiveInt]


class StageText(BaseModel):
    """One stage; flops that aren't given are a transformer block's.

    ``dims`` changes sizes of the file's; ``heads`` are attention's, without them there is none
    that could run on a sharded dim. ``parts``: what Megatron-style parallelism gathers for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    mixes: Annotated[tuple[str, ...], Field(min_length=1)]
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    mlp: NonNegativeFloat = 4.0
    causal: bool = False
    dims: Sizes = {}
    flops: NonNegativeFloat | None = None
    attention_flops: NonNegativeFloat | None = None
    parts: PositiveInt = 2
    after: tuple[str, ...] | None = None


class StagesText(BaseModel):
    """Stages in their order, ``repeat`` times over; ``sequence``: the dims that may be sharded.

    ``outside``: those that may be before the first stage and after the last. ``channel``: the dim
    that heads divide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dims: Sizes
    sequence: Annotated[tuple[str, ...], Field(min_length=1)]
    outside: tuple[str, ...] | None = None
    channel: str = "channel"
    dtype: str = "bfloat16"
    repeat: PositiveInt = 1
    stages: Annotated[tuple[StageText, ...], Field(min_length=1)]

    def build(self) -> list[Stage]:
        """The stages; those that are repeated are called name.0, name.1, …; ConfigError."""
        found = []
        for turn in range(self.repeat):
            number = f".{turn}" if self.repeat > 1 else ""
            for one in self.stages:
                after = one.after and tuple(name + number for name in one.after)
                found.append(self._stage(one, one.name + number, after))
        return found

    def _stage(self, one: StageText, name: str, after: tuple[str, ...] | None) -> Stage:
        sizes = self.dims | one.dims
        if one.heads is None:
            return Stage(
                name,
                sizes,
                one.mixes,
                flops=one.flops or 0.0,
                attention_flops=one.attention_flops or 0.0,
                channel=self.channel,
                dtype=self.dtype,
                parts=one.parts,
                after=after,
            )
        block = transformer_block(
            *(name, sizes, one.mixes, one.heads),
            kv_heads=one.kv_heads,
            channel=self.channel,
            mlp=one.mlp,
            causal=one.causal,
            dtype=self.dtype,
        )
        given = {"flops": one.flops, "attention_flops": one.attention_flops}
        told = {key: value for key, value in given.items() if value is not None}
        return Stage(**{**vars(block), **told, "parts": one.parts, "after": after})


def examples() -> tuple[str, ...]:
    """Names of the descriptions that come with longspan."""
    folder = resources.files("longspan.planner") / "examples"
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir()))


def read_stages(source: str | Path) -> StagesText:
    """Of a YAML file, or an example's name; ConfigError, in one line, if it can't be."""
    if str(source) in examples():
        text = (resources.files("longspan.planner") / "examples" / f"{source}.yaml").read_text()
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(
                f"no stages at {path}: give a YAML file or one of {', '.join(examples())}"
            )
        text = path.read_text(encoding="utf-8")
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return StagesText.model_validate(values)
    except ValidationError as error:
        first, *rest = error.errors(include_url=False)
        place = ".".join(map(str, first["loc"]))
        more = f" (and {len(rest)} more)" if rest else ""
        raise ConfigError(
            f"{source}: {place + ': ' if place else ''}{first['msg']}{more}"
        ) from None
