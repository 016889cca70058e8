"""Train one expert of a Wan model on latent shards.

accelerate launch train.py expert=low_noise data.shards=DIR        python train.py --help
"""

import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from wantrain import config, world
from wantrain.data import SETS, Plan
from wantrain.training import assemble, estimate
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
        make_data(Path(cfg.data.shards))
    base, init_from = (None if path is None else config.locate(path) for path in (cfg.weights, cfg.init_from))
    model, expert, data = config.plain(cfg.model), config.plain(cfg.expert), config.build(cfg.data)
    if base is not None and cfg.expert.name != "vae":
        assemble.check_encoders(data.manifest, base, cfg.data.shards)
    plan = Plan(data.buckets, batch_size=cfg.batch_size, seed=cfg.seed)
    steps = estimate.run_length(plan, steps=cfg.steps, epochs=cfg.epochs, default=cfg.model.steps)
    trainee = assemble.build_trainee(
        lambda: config.build(cfg.model.vae if cfg.expert.name == "vae" else cfg.model.transformer),
        model=model,
        expert=expert,
        adapter=config.plain(cfg.adapter),
        base=base,
        init_from=init_from,
        seed=cfg.seed,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )
    if cfg.dry_run:
        world.say(config.to_yaml(cfg))
        size = {"steps": steps, "accumulate": cfg.accumulate, "processes": accelerator.num_processes}
        world.say(estimate.describe(plan, data.bucket_names, trainee.module, **size))
        return

    folder, settings = RunFolder(Path(cfg.runs) / cfg.run), config.plain(cfg)
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
        state={"expert": cfg.expert.name, "data": data.fingerprint},
    )
    start, ended_by = run.resume(), None
    world.say(f"run {folder.path}: step {start} of {steps}")
    if start < steps:
        run.metrics.tracker = build_tracker(**settings["tracker"], run=cfg.run, folder=folder.path, config=settings)
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


def make_data(shards: Path) -> None:
    """Make the project's own footage and shards (data/NAME/latents) if they are asked for and not there, and say so."""
    ours = shards.parent in {Path("data", name) for name in SETS}
    if world.is_main() and ours and not (shards / "manifest.json").is_file():
        world.say(f"making {shards.parent} (procedural clips; once)")
        make = [sys.executable, str(config.ROOT / "demo.py"), "data", shards.parent.name]
        if code := subprocess.run(make, check=False, env=world.alone()).returncode:
            sys.exit(code)  # the child has said what is wrong


if __name__ == "__main__":
    main()
