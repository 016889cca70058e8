"""Train one expert of a Wan model on latent shards, or the pair in one job.

accelerate launch train.py expert=low_noise data.shards=DIR        python train.py --help
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from wantrain import checks, config, world
from wantrain.data import Plan
from wantrain.training import assemble, estimate, noise_report
from wantrain.training.loop import Run, fit
from wantrain.training.parallel import start_accelerator
from wantrain.training.run import RunFolder
from wantrain.training.start import Start
from wantrain.training.stepper import finish
from wantrain.training.trackers import build_tracker
from wantrain.training.turns import Turns
from wantrain.training.waiting import main_first


@config.app("train")
def main(cfg: DictConfig) -> None:
    """Train one expert or both, or continue the run of that name."""
    checks.check(cfg, processes=world.world_size())
    accelerator = start_accelerator(hang=cfg.tripwires.hang)
    experts, model = config.experts(cfg), config.plain(cfg.model)
    home = assemble.find_home(accelerator, {name: config.plain(own) for name, own in experts.items()})
    wanted = [*(model["experts"] if cfg.sample.every else experts), "vae", "text_encoder", "tokenizer"]
    base = main_first(lambda: config.base(cfg, wanted), "finding the base model")
    main_first(lambda: assemble.make_own_data(config.shards(cfg), root=config.ROOT), "making the project's own data")
    data, dtype = config.build(cfg.data), config.dtype(cfg.precision)
    if "vae" not in experts:
        assemble.check_encoders(data.manifest, base, config.shards(cfg), dtype)
    plan = Plan.of(data, batch_size=cfg.batch_size, seed=cfg.seed)
    steps = estimate.run_length(plan, steps=cfg.steps, epochs=cfg.epochs, default=cfg.model.steps)
    turns = Turns(config.plain(cfg.experts.share) if len(experts) > 1 else dict.fromkeys(experts, 1))
    where = {"base": base, "device": home.device, "dtype": dtype, "recipe": config.recipe()}
    starts = {name: Start.of(config.network(own), config.plain(own), **where) for name, own in experts.items()}
    trainees = {name: start.trainee() for name, start in starts.items()}
    losses = {name: config.build(own.loss) for name, own in experts.items()}
    estimate.say_turns(turns, losses, steps)
    if cfg.dry_run:
        size = {"steps": steps, "accumulate": cfg.accumulate, "processes": accelerator.num_processes}
        world.say(config.to_yaml(cfg))
        world.say(estimate.describe(plan, data, next(iter(trainees.values())).module, **size))
        return

    folder, settings = RunFolder(Path(cfg.runs) / cfg.run), {**config.plain(cfg), "recipe": config.recipe()}
    checkpoints, newest = assemble.open_run(folder, settings, home, data=data.fingerprint, command=config.command())
    members = {
        name: assemble.enlist(
            trainees[name],
            home,
            checkpoint=newest,
            optimizer=config.build(own.optimizer, _partial_=True),
            how={key: own[key] for key in ("accumulate", "clip", "precision")},
            ema=own.ema,
            name=name,
            loss=losses[name],
            schedule=config.build(own.schedule),
            plan=Plan.of(data, batch_size=cfg.batch_size, seed=cfg.seed),
            steps=turns.count(name, steps),
            folder=name if len(experts) > 1 else "",
        )
        for name, own in experts.items()
    }
    run = Run(
        members=members,
        turns=turns,
        data=data,
        checkpoints=checkpoints,
        **assemble.guards(folder, home, steps=steps, fps=model["fps"], **settings["tripwires"]),
        steps=steps,
        until=min(steps, cfg.stop_after or steps),
        seed=cfg.seed,
        checkpoint_every=cfg.checkpoint.every,
        state={"data": data.fingerprint, "engine": home.engine, "config": settings},
    )
    start, ended_by = run.resume(newest), None
    world.say(f"run {folder.path}: {estimate.progress(start, steps)}")
    if start < run.until:
        run.metrics.tracker = build_tracker(**settings["tracker"], run=cfg.run, folder=folder.path, config=settings)
        with run.metrics:
            if start == 0 and cfg.check_expert != "off":
                assemble.check_experts(run, starts, how=cfg.check_expert)
            noise_report.write(folder.path, losses, data.bucket_names, multiple=model["multiple"])
            run.hooks = assemble.build_hooks(run, settings, base=base, folder=folder.samples, dtype=dtype)
            ended_by = fit(run, start)
    finish(member.stepper for member in members.values())
    assemble.compare_replay(folder, settings)
    if ended_by is not None:
        world.say("stopped by a signal, after a checkpoint; the same command continues")
        sys.exit(128 + ended_by)


if __name__ == "__main__":
    main()
