"""Train one expert of a Wan model on latent shards.

accelerate launch train.py expert=low_noise data.shards=DIR        python train.py --help
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from wantrain import config, world
from wantrain.data import Plan
from wantrain.training import assemble, estimate, which_expert
from wantrain.training.checkpoint import Checkpoints
from wantrain.training.loop import Run, fit
from wantrain.training.metrics import Metrics, build_tracker
from wantrain.training.optim import build_optimizer
from wantrain.training.parallel import Stepper, start_accelerator
from wantrain.training.run import RunFolder


@config.app("train")
def main(cfg: DictConfig) -> None:
    """Train one expert, or continue the run of that name."""
    config.check(cfg, processes=world.world_size())
    accelerator = start_accelerator()
    with accelerator.main_process_first():
        model, name = config.plain(cfg.model), cfg.expert.name
        wanted = [*(model["experts"] if cfg.sample.every else [name]), "vae", "text_encoder", "tokenizer"]
        base = config.base(cfg, wanted)
        assemble.make_own_data(Path(cfg.data.shards), root=config.ROOT)
    data = config.build(cfg.data)
    if name != "vae":
        assemble.check_encoders(data.manifest, base, cfg.data.shards, config.dtype(cfg.precision))
    plan = Plan(data.buckets, batch_size=cfg.batch_size, seed=cfg.seed)
    steps = estimate.run_length(plan, steps=cfg.steps, epochs=cfg.epochs, default=cfg.model.steps)
    begin = assemble.Start(
        lambda: config.build(cfg.model.vae if name == "vae" else cfg.model.transformer),
        model=model,
        expert=config.plain(cfg.expert),
        adapter=config.plain(cfg.adapter),
        base=base,
        scratch=cfg.init == "scratch",
        seed=cfg.seed,
        device=accelerator.device,
        dtype=config.dtype(cfg.precision),
        recipe=config.recipe(),
    )
    trainee = begin.trainee(gradient_checkpointing=cfg.gradient_checkpointing)
    if cfg.dry_run:
        world.say(config.to_yaml(cfg))
        size = {"steps": steps, "accumulate": cfg.accumulate, "processes": accelerator.num_processes}
        world.say(estimate.describe(plan, data.bucket_names, trainee.module, **size))
        return

    folder, settings = RunFolder(Path(cfg.runs) / cfg.run), {**config.plain(cfg), "recipe": config.recipe()}
    if world.is_main():
        folder.open(settings)
    accelerator.wait_for_everyone()
    optimizer = build_optimizer(config.build(cfg.optimizer, _partial_=True), trainee.module)
    how = {key: cfg[key] for key in ("accumulate", "clip", "precision")}
    stepper = Stepper(accelerator, trainee.module, optimizer, **how)
    run = Run(
        trainee=trainee,
        stepper=stepper,
        loss=config.build(cfg.loss),
        data=data,
        plan=plan,
        schedule=config.build(cfg.schedule),
        checkpoints=Checkpoints(folder.checkpoints, keep=cfg.checkpoint.keep),
        metrics=Metrics(folder.metrics, steps=steps),
        steps=steps,
        seed=cfg.seed,
        checkpoint_every=cfg.checkpoint.every,
        state={"expert": name, "data": data.fingerprint},
    )
    start, ended_by = run.resume(), None
    world.say(f"run {folder.path}: step {start} of {steps}")
    if start < steps:
        run.metrics.tracker = build_tracker(**settings["tracker"], run=cfg.run, folder=folder.path, config=settings)
        if start == 0 and cfg.check_expert != "off" and begin.is_measurable():
            which_expert.check(
                stepper, run.first_batch(), model=model, expert=name, how=cfg.check_expert, seed=cfg.seed
            )
        watched = {"validation": settings["validation"], "sample": settings["sample"]}
        run.hooks = assemble.build_hooks(run, model=model, base=base, folder=folder.samples, **watched)
        ended_by = fit(run, start)
        run.metrics.tracker.close()
    else:
        world.say(f"this run is finished ({start} steps); a larger steps= continues it")
    stepper.finish()
    if ended_by is not None:
        world.say("stopped by a signal, after a checkpoint; the same command continues")
        sys.exit(128 + ended_by)


if __name__ == "__main__":
    main()
