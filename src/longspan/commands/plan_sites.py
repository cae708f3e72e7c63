"""The command ``longspan plan-sites``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from longspan.plan import SitePlan

__all__ = ["plan_sites"]


def plan_sites(
    cluster: Annotated[str, typer.Option(help="A preset's name, or a cluster's YAML file.")],
    params: Annotated[float, typer.Option(help="Parameters of the model: 10e9.")],
    layers: Annotated[int, typer.Option(help="Its layers.")],
    step: Annotated[float, typer.Option(help="Seconds that an inner step computes at a site.")],
    utilisation: Annotated[
        float, typer.Option(help="Share of the time that devices are to compute.")
    ] = 0.95,
    out: Annotated[Path | None, typer.Option(help="Write the plan: a JSON file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw what the sites do, and what is under way: an SVG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How often sites exchange what, so that their devices need not wait for the link."""
    from longspan.cluster.spec import read_cluster
    from longspan.plan import write_plan
    from longspan.planner.sites import plan_sites as choose

    where = read_cluster(cluster)
    plan = choose(where, params=params, layers=layers, step_s=step, wanted=utilisation)
    if out:
        write_plan(plan, out)
    if picture:
        from longspan.planner.sites import site_spans
        from longspan.report.timeline import write_timeline

        write_timeline(site_spans(plan, where, params=params, layers=layers, step_s=step), picture)
    if as_json:
        print(json.dumps(asdict(plan), indent=2))
        return
    print("\n".join(_lines(plan, utilisation)))


def _lines(plan: "SitePlan", wanted: float) -> list[str]:
    alone = (
        f"data-parallel: devices compute {plan.data_parallel_utilisation:.1%} of the time at "
        f"{plan.link_gbit_per_s:g} Gbit/s; {wanted:.0%} needs {plan.data_parallel_gbit_per_s:.3g}"
    )
    if plan.method == "data-parallel":
        return [f"{plan.sites} sites: plain data-parallel training is good enough.", alone]
    fits = "" if plan.utilisation >= wanted else f" (less than {wanted:.0%}: the link is too slow)"
    return [
        f"{plan.sites} sites: streaming, devices compute {plan.utilisation:.1%} of the time{fits}",
        alone,
        f"sent by a site: {plan.mean_gbit_per_s:.3g} Gbit/s on average, "
        f"{plan.peak_gbit_per_s:.3g} while a fragment is under way",
        "",
        "outer:",
        f"  sites: {plan.sites}",
        f"  sync_every: {plan.sync_every}",
        f"  delay: {plan.delay}",
        f"  fragment_layers: {plan.fragment_layers}  # {plan.fragments} fragments of layers",
        f"  codec: {plan.codec}",
        f"  lr: {plan.outer_lr}",
    ]
