"""The training loop."""

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from longspan.outer.sync import OuterSync
from longspan.train.checkpoint import Progress, load_newest, save
from longspan.train.figures import plan_figures, ring_figures
from longspan.train.job import Job, prove
from longspan.train.optimize import lr_at, set_lr, steps_done
from longspan.train.sites import figures_of
from longspan.train.step import StepRunner, summed
from longspan.train.stop import StopWish
from longspan.train.strategy import RowRunner

__all__ = ["train"]


def train(job: Job, wish: StopWish) -> None:
    """Train from the newest checkpoint, or from the start, until done or told to stop."""
    steps, recorder = job.config.train.steps, job.recorder
    prove(job)
    if not job.planned and isinstance(job.runner, StepRunner):
        recorder.note("batch", _picture(job, job.runner))
    progress = _resume(job)
    stopped = False
    while progress.step < steps and not stopped:
        progress, stopped = _step(job, progress, wish)
        if _due(progress.step, job.config.train.validate_every, steps):
            _validate(job, progress.step)
        if stopped or _due(progress.step, job.config.checkpoint.every, steps):
            _save(job, progress)
    reason = "stopped" if progress.step < steps else "done"
    about = {"reason": reason, "steps": progress.step, "seconds": recorder.seconds}
    recorder.note("end", about)
    if reason == "stopped":
        recorder.say(f"stopped after step {progress.step}; the same command goes on from there")


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _resume(job: Job) -> Progress:
    progress, refused = load_newest(_folder(job), job.runner.model, job.optimizer, *_together(job))
    for words in refused:
        job.recorder.note("refused", {"checkpoint": words})
        job.recorder.say(f"checkpoint refused: {words}")
    if progress is None:
        return Progress(step=0, cursor=0)
    job.recorder.note("resume", asdict(progress))
    job.recorder.say(f"going on after step {progress.step}")
    return progress


def _step(job: Job, progress: Progress, wish: StopWish) -> tuple[Progress, bool]:
    """One optimizer step; also whether to stop: a rank was told to, and all sites know it."""
    config, recorder, runner = job.config, job.recorder, job.runner
    start = time.perf_counter()
    batch, planned = job.step(progress.cursor)
    if planned:
        recorder.note("plan", {"step": progress.step + 1} | asdict(planned.plan))
    with recorder.span("forward and backward"):
        own_loss = runner.gradients(batch)
    with recorder.span("optimizer"):
        parameters = runner.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        own = steps_done(job.optimizer)
        lr = lr_at(progress.step, config.train.steps, config.optimizer, own)
        set_lr(job.optimizer, lr)
        job.optimizer.step()
        job.optimizer.zero_grad()
    heard = torch.tensor(float(wish.heard), device=runner.device)
    loss, told = summed(runner.site, own_loss, heard)
    stop, outer, ahead = told > 0, {}, 0
    if job.outer:
        coming_and_going = config.outer.rendezvous is not None
        with recorder.span("outer", "comm"):
            found = job.outer.step(batch.tokens, stop and not coming_and_going)
        stop = stop if coming_and_going else found.stop
        outer, ahead = figures_of(found, runner.site.size()), found.ahead
        if found.sites:
            recorder.note("sites", {"step": progress.step + 1, "sites": found.sites})
            recorder.say(f"step {progress.step + 1}: {found.sites} sites exchange from here on")
        for words in found.lost:
            recorder.note("lost", {"exchange": words})
            recorder.say(words)
    seconds = time.perf_counter() - start
    figures = {
        "loss": loss,
        "lr": lr,
        "grad_norm": _number(norm),
        "tokens": batch.tokens,
        "documents": batch.documents,
        "step_s": seconds,
        "tokens_per_s": batch.tokens / seconds,
        **outer,
    }
    if planned:
        figures |= plan_figures(planned)
    elif isinstance(runner, RowRunner):
        figures["padding"] = runner.padding(batch)
    elif recorder.leader:
        figures |= ring_figures(
            *(batch.sequences, runner.model.config, getattr(torch, config.train.dtype)),
            *(runner.sp.size(), config.parallel),
        )
    recorder.step(progress.step + 1, figures)
    # A site that was away, or is new, goes on where the others are: in steps, and in the data.
    cursor = batch.cursor + ahead * (batch.cursor - progress.cursor)
    return Progress(progress.step + 1 + ahead, cursor), stop


def _folder(job: Job) -> Path:
    """Where this rank's site keeps its checkpoints: sites needn't share a disk."""
    folder = job.config.run / "checkpoints"
    return folder / f"site{job.site}" if job.outer else folder


def _together(job: Job) -> tuple[dist.ProcessGroup, OuterSync | None]:
    return job.runner.site, job.outer


def _picture(job: Job, runner: StepRunner) -> dict[str, object]:
    """A sequence of many documents, to draw which rank holds what of it."""
    sequences = job.batches.step(job.batches.most_mixed(job.dp), job.dp_rank, job.dp).sequences
    most = max(sequences, key=lambda sequence: len(sequence.cu_seqlens))
    return {
        "cu_seqlens": most.cu_seqlens.tolist(),
        "world": runner.sp.size(),
        "order": runner.order,
    }


def _number(norm: torch.Tensor) -> float:
    return float(getattr(norm, "full_tensor", lambda: norm)())


def _validate(job: Job, step: int) -> None:
    agreed = job.outer.global_parameters() if job.outer else nullcontext()
    with job.recorder.span("validation"), agreed:
        loss = job.runner.validation_loss(job.validation())
    job.recorder.step(step, {"validation_loss": loss})


def _save(job: Job, progress: Progress) -> None:
    start = time.perf_counter()
    keep = job.config.checkpoint.keep
    path = save(_folder(job), job.runner.model, job.optimizer, progress, keep, *_together(job))
    about = {"step": progress.step, "path": str(path), "seconds": time.perf_counter() - start}
    size = sum(file.stat().st_size for file in path.iterdir())
    job.recorder.note("checkpoint", about | {"bytes": size})
