"""Judging data.schedule with what it has to agree with: the sets, the length of the run, and what counts steps."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig

from wantrain import config
from wantrain.data import check_sets, read_schedule


def check_schedule(cfg: DictConfig, processes: int) -> None:
    """ValueError for a schedule that cannot be, or that no step of the run would come to."""
    from wantrain.training.alternation import ExpertAlternation  # sample.py and export.py import nothing of training

    entries = read_schedule(config.plain(cfg.data)["schedule"], check_sets(config.plain(cfg.data)["sets"]))
    if cfg.epochs is not None:
        raise ValueError(
            f"epochs={cfg.epochs:g} are passes over one mix of sets, and data.schedule has several; give steps="
        )
    steps = cfg.steps or cfg.model.steps
    if cfg.expert.name == "both":
        alternation = ExpertAlternation.of(list(cfg.model.experts), config.plain(cfg.experts.share))
        own = min(alternation.count(name, steps) for name in cfg.model.experts)
    else:
        own = steps
    if entries[-1].start >= own:
        whose = "" if own == steps else f", of which an expert makes {own}"
        raise ValueError(
            f"data.schedule[{len(entries) - 1}].from={entries[-1].start} never comes in steps={steps}{whose}; leave "
            "the entry out, or give more steps= (stop_after= ends this start earlier)"
        )
    _check_sizes(cfg, [entry.batch_size for entry in entries], processes)


def _check_sizes(cfg: DictConfig, sizes: list[int | None], processes: int) -> None:
    """Batch sizes of entries: they go with batch_size=, in as many backward passes, and with what counts no samples."""
    given = [size for size in sizes if size is not None]
    if not given:
        return
    if cfg.batch_tokens is not None:
        raise ValueError(
            f"batch_size={given[0]} in data.schedule: batch_tokens={cfg.batch_tokens} says how large every step is; "
            "leave one of them out"
        )
    batching = config.batching(cfg, processes)
    for number, size in enumerate(sizes):
        try:
            batching.resized(size)
        except ValueError as error:
            raise ValueError(f"data.schedule[{number}]: {error}") from error
    if cfg.loss.get("stratified"):
        raise ValueError(
            "loss.stratified=true shares out steps of one size, and data.schedule has several; leave it out"
        )
    dropouts = [each.get("caption_dropout") for each in (cfg.data, *cfg.data.sets.values())]
    if any(isinstance(each, ListConfig) for each in dropouts):
        raise ValueError(
            "data.caption_dropout by step counts steps by batch_size, and data.schedule has several; give one share"
        )
