"""Train one expert of a Wan model on latent shards, or the pair in one job.

accelerate launch train.py expert=low_noise data.shards=DIR        python train.py --help
"""

from pathlib import Path

from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.data import Plan
from wantrain.demo.shards import make_own_data
from wantrain.runs.folder import RunFolder
from wantrain.training import build, encoder_check
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.engine.accelerator import engine_asked_for, start_accelerator
from wantrain.training.engine.engine import finish
from wantrain.training.engine.main_process import main_first
from wantrain.training.engine.placement import card_of, check_engine, find_placement
from wantrain.training.initialize import Initializer
from wantrain.training.loop import Run, fit
from wantrain.training.monitoring import noise_report
from wantrain.training.monitoring.trackers import build_tracker
from wantrain.training.monitoring.watchdog import Watchdog
from wantrain.training.planning import estimate, memory
from wantrain.training.planning.outline import check_size, find_clips, outline
from wantrain.training.validation.build import build_hooks, preview_texts
from wantrain.util import distributed
from wantrain.util.console import say


@config.app("train")
def main(cfg: DictConfig) -> None:
    """Train one expert or both, or continue the run of that name."""
    checks.check(cfg, processes=distributed.world_size())
    with Watchdog(cfg.safeguards.hang):
        train(cfg)


def train(cfg: DictConfig) -> None:
    """From a config that has been judged to the end of the run, or of a dry run."""
    experts, dtype = config.experts(cfg), config.dtype(cfg.precision)
    own = {name: config.plain(each) for name, each in experts.items()}
    networks = {name: config.network(each) for name, each in experts.items()}
    losses = {name: config.build(each.loss) for name, each in experts.items()}
    optimizers = {name: config.build(each.optimizer, _partial_=True) for name, each in experts.items()}
    alternation = ExpertAlternation(config.plain(cfg.experts.share) if len(experts) > 1 else dict.fromkeys(experts, 1))
    batching, settings = (
        config.batching(cfg, distributed.world_size()),
        {**config.plain(cfg), "recipe": config.recipe()},
    )
    outlines = {name: outline(networks[name], own[name], dtype) for name in experts}
    kept = memory.standing(outlines, optimizers, averaged={n for n in own if own[n]["ema"]}, idle=cfg.experts.idle)
    length = {"steps": cfg.steps, "epochs": cfg.epochs, "default": cfg.model.steps}
    if cfg.dry_run:
        check_engine(engine_asked_for(), own)
        say(config.to_yaml(cfg))
        clips = find_clips(config.shards(cfg), lambda: config.build(cfg.data), settings)
        foreseen = estimate.foreseen_length(clips.plan, **length)
        estimate.say_turns(alternation, losses, foreseen)
        say(estimate.describe(clips, outlines, batching, foreseen, kept))
        return
    placement = find_placement(start_accelerator(cfg.device, hang=cfg.safeguards.hang), own)
    check_size(outlines, placement.accelerator.device, cfg.device)
    estimate.say_start(settings, batching, kept, card_of(placement))
    base = main_first(lambda: config.base(cfg, build.wanted(settings, experts)), "finding the base model")
    main_first(lambda: make_own_data(config.shards(cfg), root=config.ROOT), "making the project's own data")
    data, folder = config.build(cfg.data), RunFolder(Path(cfg.runs) / cfg.run)
    encoder_check.check(data, base, dtype, places=config.shards(cfg), otherwise=folder.path)
    steps = estimate.run_length(Plan.of(data, batch_size=cfg.batch_size, seed=cfg.seed), **length)
    texts = preview_texts(data, settings, placement, base, dtype)  # before experts leave the device no room
    where = {"base": base, "device": placement.device, "dtype": dtype, "recipe": config.recipe()}
    starts = {name: Initializer.of(networks[name], own[name], **where) for name in experts}
    trainables = {name: start.trainable() for name, start in starts.items()}
    estimate.say_turns(alternation, losses, steps)
    checkpoints, newest = build.open_run(folder, settings, placement, data=data.fingerprint, command=config.command())
    trainers = {
        name: build.build_expert(
            trainables[name], placement, checkpoint=newest, optimizer=optimizers[name],
            how={"accumulate": batching.accumulate, "clip": each.clip, "precision": each.precision},
            ema=each.ema, name=name, loss=losses[name], schedule=config.build(each.schedule),
            plan=Plan.of(data, batch_size=cfg.batch_size, seed=cfg.seed), steps=alternation.count(name, steps),
            folder=name if len(experts) > 1 else "",
        )
        for name, each in experts.items()
    }  # fmt: skip
    run = Run(
        trainers=trainers, alternation=alternation, data=data, checkpoints=checkpoints,
        **build.guards(folder, placement, steps=steps, fps=cfg.model.fps, safeguards=settings["safeguards"]),
        steps=steps, until=min(steps, cfg.stop_after or steps), seed=cfg.seed, checkpoint_every=cfg.checkpoint.every,
        state={"data": data.fingerprint, "engine": placement.engine, "config": settings},
    )  # fmt: skip
    start, ended_by = run.resume(newest), None
    say(f"run {folder.path}: {estimate.progress(start, steps)}")
    if start < run.until:
        run.metrics.tracker = build_tracker(**settings["tracker"], run=cfg.run, folder=folder.path, config=settings)
        with run.metrics:
            build.check_experts(run, starts, how=cfg.check_expert if start == 0 else "off")
            noise_report.write(folder.path, losses, data.bucket_names, multiple=cfg.model.multiple)
            run.hooks = build_hooks(run, settings, base=base, folder=folder.samples, texts=texts, dtype=dtype)
            ended_by = fit(run, start)
    finish(trainer.stepper for trainer in trainers.values())
    build.compare_replay(folder, settings)
    if ended_by is not None:
        say("stopped by a signal, after a checkpoint; the same command continues")
        raise SystemExit(128 + ended_by)


if __name__ == "__main__":
    main()
