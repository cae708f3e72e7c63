"""One plan for a whole cluster: sites, groups, attention and sharding, beside the plain way.

All that ``longspan train`` can be told is priced by ``forecast``. Of what fits, three are proposed:
"safe" has the fewest moving parts and memory to spare, "recommended" is the simplest of those about
as fast as the fastest, "fast" the fastest. What is foretold are ranges: devices and links are taken
to be slower and faster than the cluster's file says, each by itself.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Literal

from longspan.cluster.spec import Cluster
from longspan.errors import MemoryLimitError
from longspan.plan import JointPlan, Proposal, Range, Setup
from longspan.planner.forecast import Forecast
from longspan.planner.setups import Question, Scene, apart, baseline, grouped, lighter, packed

__all__ = ["is_measured", "plan_joint", "proposal", "simplest"]

# What was measured on the cluster itself may be off by so much either way. Datasheets promise what
# is never reached: devices take up to 2.5 times as long, links up to 1.5 times.
_MEASURED = 1.25
_PROMISED_DEVICES, _PROMISED_LINKS = 2.5, 1.5
_APART = 1.2  # benchmarks.flexible: step times of two setups were off by +3 % and -16 %
_MEMORY = 1.13  # a process has more than its tensors, and its allocator keeps some of what it frees
_WORTH = 1.05  # a gain below that is not worth another way of training
_SIMPLER = 1.05  # what is faster by less isn't preferred to what is simpler
_MANY = 1024  # documents of a batch that takes long to plan
_SPARE = 0.7  # of a device's memory, at most, where it is to be safe

Role = Literal["baseline", "safe", "recommended", "fast"]


def is_measured(cluster: Cluster) -> bool:
    """Whether the rates of all of a cluster's devices were measured on them."""
    return all("matmul" in cluster.devices[kind].measured for kind in cluster.kinds)


def plan_joint(question: Question) -> JointPlan:
    """The plain way, three proposals, and all else that fits.

    Raises MemoryLimitError if not even the plain way with full checkpointing fits all ranks,
    ClusterError for a cluster without the rates that are needed.
    """
    middle = _scenes(question.cluster)[0]
    plain = baseline(question)
    priced = {plain: question.told(plain, middle)}

    def price(variants: Iterable[Setup]) -> Setup | None:
        """Price the first that fits."""
        for setup in variants:
            with suppress(MemoryLimitError):
                priced[setup] = question.told(setup, middle)
                return setup
        return None

    for setup in (*packed(question), *apart(question, middle)):
        price(lighter(setup))
    spread = [one for setup in grouped(question) if (one := price(lighter(setup)))]
    # Where parameters are best kept is much the same for all ways to group.
    spread.sort(key=lambda setup: -priced[setup].tokens_per_s)
    for setup in spread[: 1 if question.documents > _MANY else None]:
        smaller = list(lighter(setup))[1:]  # which makes room for more tokens a rank
        price(smaller)
        price(lighter(replace(setup, mode="flexible")))
        price(replace(one, mode="flexible") for one in smaller)
    ranked = sorted(priced, key=lambda setup: -priced[setup].tokens_per_s)

    spare = _SPARE * question.device_bytes
    usual = {one: priced[one] for one in ranked if one.mode == "fixed" and not one.sites}
    roomy = {one: told for one, told in usual.items() if told.memory_bytes <= spare}
    safe = simplest(roomy) if roomy else plain
    recommended = simplest({setup: priced[setup] for setup in ranked})
    worth = priced[recommended].tokens_per_s >= _WORTH * priced[plain].tokens_per_s
    told: dict[Role, tuple[Setup, str]] = {
        "baseline": (plain, "packed, contiguous, on the fewest ranks that hold a sequence"),
        "safe": (safe, "nothing is planned while it trains, 30 % of the memory is spare"),
        "recommended": (recommended, "the simplest of those that are within 5 % of the fastest"),
        "fast": (ranked[0], f"the fastest of {len(ranked)} that fit"),
    }
    if not worth:
        told["recommended"] = (plain, "nothing gains enough to be worth another way")
    first, *proposals = (
        proposal(question, role, setup, plain, why) for role, (setup, why) in told.items()
    )
    return JointPlan(
        config=question.config,
        cluster=question.cluster.name,
        ranks=question.cluster.ranks,
        device_bytes=question.device_bytes,
        epoch_tokens=question.forecaster.packer.tokens,
        measured=is_measured(question.cluster),
        worth=worth,
        baseline=first,
        proposals=tuple(proposals),
        alternatives=tuple((str(setup), priced[setup].tokens_per_s) for setup in ranked),
    )


def simplest(told: Mapping[Setup, Forecast]) -> Setup:
    """The simplest of those that are about as fast as the fastest; of equally simple ones that."""
    least = max(one.tokens_per_s for one in told.values()) / _SIMPLER
    alike = [setup for setup, one in told.items() if one.tokens_per_s >= least]
    return min(alike, key=lambda setup: (*_parts(setup), -told[setup].tokens_per_s))


def _scenes(cluster: Cluster) -> list[Scene]:
    """The middle one, then the corners."""
    if is_measured(cluster):
        ends = (1 / _MEASURED, _MEASURED)
        return [(1.0, 1.0), *product(ends, ends)]
    devices, links = (1 / _PROMISED_DEVICES, 1.0), (1 / _PROMISED_LINKS, 1.0)
    return [(_PROMISED_DEVICES**-0.5, _PROMISED_LINKS**-0.5), *product(devices, links)]


def _parts(setup: Setup) -> tuple[bool, ...]:
    """Moving parts, those that cost most care first."""
    return (
        setup.sites is not None,
        setup.mode != "fixed",
        setup.checkpointing != "none",
        setup.sharding != "world",
    )


def proposal(question: Question, role: Role, setup: Setup, beside: Setup, why: str) -> Proposal:
    """What a setup is foretold to take, and to save beside another."""
    scenes = _scenes(question.cluster)
    plain = [question.told(beside, scene) for scene in scenes]
    own = [question.told(setup, scene) for scene in scenes]
    tariff, held = question.tariff, own[0].memory_bytes
    per_hour = question.forecaster.packer.tokens * question.cluster.ranks / 3600
    hours = _range([per_hour / one.tokens_per_s for one in own])
    ratios = [one.tokens_per_s / p.tokens_per_s for one, p in zip(own, plain, strict=True)]
    gain = _range(ratios)
    if setup != beside:
        gain = Range(gain.low / _APART, gain.middle, gain.high * _APART)
    whole = per_hour / plain[0].tokens_per_s
    saved = Range(*(whole * (1 - 1 / times) for times in (gain.low, gain.middle, gain.high)))
    return Proposal(
        role=role,
        setup=setup,
        tokens=own[0].tokens,
        step_s=_range([one.step_s for one in own]),
        memory_bytes=Range(held / _MEMORY, held, held * _MEMORY),
        speedup=gain,
        epoch_hours=hours,
        saved_hours=saved,
        saved_kwh=saved.times(tariff.device_kw),
        saved_money=saved.times(tariff.hour),
        why=why,
    )


def _range(figures: list[float]) -> Range:
    """Of the middle scene's figure, which is the first, and the others."""
    return Range(min(figures), figures[0], max(figures))
