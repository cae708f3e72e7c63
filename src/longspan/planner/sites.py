"""Chooses how sites that are far apart are kept together: how often, how late, in how many bits."""

from dataclasses import replace
from itertools import product

from longspan.cluster.bandwidth import required_bits_per_s, settled_spans, utilisation
from longspan.cluster.spec import Cluster
from longspan.errors import ClusterError, ConfigError
from longspan.plan import SitePlan
from longspan.schedule.outer import OuterJob
from longspan.trace import Span

__all__ = ["plan_sites", "site_spans", "site_utilisation"]

# In the order in which the model would rather have them: what costs the least learning first
# (arXiv 2501.18512, sections 3.2 to 3.4).
_EVERY = (30, 50, 100, 200, 500)
_DELAYS = (1, 2, 3, 4, 5)
_BITS = {"bf16": 16.0, "int8": 8.125, "e3m0": 4.125}
_SENT = _BITS | {"fp32": 32.0, "int4": 4.25}
_FRAGMENT_LAYERS = 3
_GRADIENT_BITS = 16
# The best of the paper's outer learning rates for so many replicas, at H = 30.
_OUTER_LR = {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}


def plan_sites(
    cluster: Cluster, *, params: float, layers: int, step_s: float, wanted: float = 0.95
) -> SitePlan:
    """The settings that cost the least learning and keep devices at work ``wanted`` of the time.

    params: of the model. step_s: seconds that an inner step computes at a site. If no settings
    reach ``wanted``, those that come nearest. Sites exchange codes with each of the others over
    the slowest uplink, whose round trip each fragment pays once.

    Raises ClusterError if the cluster has one site, ConfigError for sizes that can't be.
    """
    sites, bits_per_s, latency_s = _uplink(cluster)
    if not 0 < wanted < 1:
        raise ConfigError(f"a utilisation lies between 0 and 1, not at {wanted}")
    job = OuterJob(
        params, layers, step_s, delay=_DELAYS[0], fragment_layers=min(_FRAGMENT_LAYERS, layers)
    )
    # All-reduce sends 2(n-1)/n of its size where that of the two simulated sites sends it once.
    reduced = replace(job, bits=_GRADIENT_BITS * 2 * (sites - 1) / sites).by("data-parallel")
    together = _share(reduced, bits_per_s, latency_s)
    (needed,) = required_bits_per_s(reduced, [wanted])
    share, chosen, codec = -1.0, job, ""
    for every, (name, bits), delay in product(_EVERY, _BITS.items(), _DELAYS):
        this = replace(job, every=every, delay=delay, bits=bits * (sites - 1))
        if (reached := _share(this, bits_per_s, latency_s)) > share:
            share, chosen, codec = reached, this, name
        if share >= wanted:
            break
    sent_bits = params * chosen.bits
    largest = chosen.fragment_layers / layers * sent_bits
    return SitePlan(
        method="data-parallel" if together >= wanted else "streaming",
        sites=sites,
        sync_every=chosen.every,
        delay=chosen.delay,
        fragment_layers=chosen.fragment_layers,
        fragments=-(-layers // chosen.fragment_layers),
        codec=codec,
        outer_lr=_OUTER_LR[max(n for n in _OUTER_LR if n <= sites)],
        utilisation=share,
        mean_gbit_per_s=sent_bits / (chosen.every * step_s) / 1e9,
        peak_gbit_per_s=largest / (chosen.delay * step_s) / 1e9,
        link_gbit_per_s=bits_per_s / 1e9,
        data_parallel_utilisation=together,
        data_parallel_gbit_per_s=needed / 1e9,
    )


def site_utilisation(
    plan: SitePlan, cluster: Cluster, *, params: float, layers: int, step_s: float
) -> float:
    """Share of the time that devices compute if a plan is kept to on this cluster."""
    return utilisation(*_planned(plan, cluster, params, layers, step_s))


def site_spans(
    plan: SitePlan, cluster: Cluster, *, params: float, layers: int, step_s: float
) -> list[Span]:
    """What two sites do, and what is under way between them, if a plan is kept to: a timeline."""
    return settled_spans(*_planned(plan, cluster, params, layers, step_s))


def _planned(
    plan: SitePlan, cluster: Cluster, params: float, layers: int, step_s: float
) -> tuple[OuterJob, float]:
    sites, bits_per_s, latency_s = _uplink(cluster)
    bits = _SENT[plan.codec] * (sites - 1)
    cut = plan.fragment_layers
    job = OuterJob(params, layers, step_s, plan.sync_every, plan.delay, bits, cut)
    return _longer(job, bits_per_s, latency_s), bits_per_s


def _uplink(cluster: Cluster) -> tuple[int, float, float]:
    """How many sites, bits a second of the slowest uplink, and the round trip's latency."""
    uplinks = [site.uplink for site in cluster.sites for _ in range(site.count)]
    links = [link for link in uplinks if link is not None]
    if len(uplinks) < 2:
        raise ClusterError("the cluster has one site: nothing is to be kept together")
    bits_per_s = 8 * min(link.bytes_per_s for link in links)
    return len(uplinks), bits_per_s, 2 * max(link.latency_s for link in links)


def _share(job: OuterJob, bits_per_s: float, latency_s: float) -> float:
    return utilisation(_longer(job, bits_per_s, latency_s), bits_per_s)


def _longer(job: OuterJob, bits_per_s: float, latency_s: float) -> OuterJob:
    """Each fragment's messages longer by what the latency could have carried."""
    longer = latency_s * bits_per_s * job.layers / job.params / job.fragment_layers
    return replace(job, bits=job.bits + longer)
