"""Joins a run's sites: the outer synchronisation that a config asks for."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from longspan.comm.mesh import new_axis_group
from longspan.outer.average import GroupAverage
from longspan.outer.fragments import split
from longspan.outer.sync import OuterFigures, OuterSync
from longspan.train.config import Config

__all__ = ["figures_of", "make_outer"]


def make_outer(config: Config, model: nn.Module, mesh: DeviceMesh) -> OuterSync | None:
    """What keeps this rank's shard alike at all sites; None where there is one site.

    All ranks must call it.
    """
    outer = config.outer
    if outer.sites == 1:
        return None
    group = new_axis_group(mesh, "replica", outer.timeout_s)
    return OuterSync(
        model,
        average=GroupAverage(group, outer.timeout_s),
        fragments=split(model, outer.fragments, outer.fragment_layers),
        sync_every=outer.sync_every,
        delay=outer.delay,
        mix=outer.mix,
        outer_lr=outer.lr,
        momentum=outer.momentum,
        codec=outer.codec,
        error_feedback=outer.error_feedback,
        device=torch.device("cpu") if outer.offload else None,
    )


def figures_of(found: OuterFigures, ranks: int) -> dict[str, float]:
    """For the trace; a site's bytes are this rank's times its ``ranks``."""
    figures = {"outer_bytes": float(found.sent_bytes * ranks), "outer_wait_s": found.wait_s}
    if found.cosine:
        figures["outer_cosine"] = sum(found.cosine) / len(found.cosine)
    if found.lost:
        figures["outer_lost"] = float(len(found.lost))
    return figures
