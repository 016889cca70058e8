"""Train one expert of a Wan model on latent shards, or the pair in one job.

accelerate launch train.py expert=low_noise data.shards=DIR        python train.py --help
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

from pathlib import Path

from omegaconf import DictConfig

from wantrain import auto, checks, config
from wantrain.demo.shards import make_own_data
from wantrain.runs.folder import RunFolder
from wantrain.training import build, encoder_check
from wantrain.training.engine.accelerator import engine_asked_for, start_accelerator
from wantrain.training.engine.engine import finish
from wantrain.training.engine.main_process import main_first
from wantrain.training.engine.placement import check_engine, find_placement
from wantrain.training.loop import fit
from wantrain.training.monitoring import agreement, loss_masks, noise_report
from wantrain.training.monitoring.trackers import build_tracker
from wantrain.training.monitoring.watchdog import Watchdog
from wantrain.training.options import RunSetup
from wantrain.training.planning import estimate
from wantrain.training.planning.outline import find_clips
from wantrain.training.planning.trial_step import out_of_memory
from wantrain.training.validation.build import build_evaluations, texts_needed
from wantrain.util import devices, distributed
from wantrain.util.cards import planned_card
from wantrain.util.console import say
from wantrain.util.files import check_writable


@config.app("train")
def main(cfg: DictConfig) -> None:
    """Train one expert or both, or continue the run of that name."""
    checks.check(cfg, given=config.given(cfg), processes=distributed.world_size())
    with Watchdog(cfg.safeguards.hang):
        train(auto.resolve(cfg, config.given(cfg, every=True)))


def train(cfg: DictConfig) -> None:
    """From a checked config to the end of the run, or of a dry run."""
    forecast, dtype = config.forecast(cfg), config.dtype(cfg.precision)
    settings, experts, batching = forecast.settings, forecast.experts, forecast.batching
    own = {name: expert.settings for name, expert in experts.items()}
    if cfg.dry_run:
        check_engine(engine := forecast.engine(engine_asked_for()), own)
        say(config.to_yaml(cfg))
        clips = find_clips(config.shards(cfg), lambda: config.build(cfg.data), settings)
        say(forecast.describe(clips, engine=engine, card=planned_card(cfg.gpu)))
        return
    folder = RunFolder(Path(cfg.runs) / cfg.run)
    if distributed.is_main():
        check_writable(folder.path, key="runs")
    accelerator = start_accelerator(cfg.device, hang=cfg.safeguards.hang)
    agreement.check_start(settings, folder.path, accelerator.device, checkpoint=forecast.checkpoint_bytes)
    placement = find_placement(accelerator, own)
    devices.announce(placement.device)
    forecast.check_device(placement.device, asked=cfg.device)
    base = main_first(lambda: config.base(cfg, build.parts_needed(settings, experts)), "finding the base model")
    main_first(lambda: make_own_data(config.shards(cfg), root=config.ROOT), "making the project's own data")
    data = config.build(cfg.data)
    agreement.check_data(data.fingerprint)
    say(forecast.start(data, placement.engine, placement.device))
    loss_masks.check([expert.loss for expert in experts.values()], data)
    encoder_check.check(data, base, dtype, places=config.shards(cfg), otherwise=folder.path)
    steps = estimate.run_length(batching.order(data, cfg.seed), **forecast.length)
    texts = texts_needed(data, settings, experts, placement, base, dtype)  # before experts leave the device no room
    found = {"data": data, "base": base, "placement": placement, "folder": folder, "texts": texts}
    setup = RunSetup(settings, experts, forecast.alternation, batching, dtype=dtype, steps=steps, **found)
    initializers = build.build_initializers(setup)
    trainables = {name: initializer.trainable() for name, initializer in initializers.items()}
    if line := forecast.share_of_steps(steps):
        say(line)
    checkpoints, newest = build.open_run(setup, config.command())
    trainers = build.build_trainers(setup, trainables, newest)
    monitoring = metrics, _, safeguards = build.build_monitoring(setup)
    start = build.resume(trainers, safeguards, metrics, newest, data=data)
    say(f"run {folder.path}: {estimate.progress(start, steps)}")
    ended_by = None
    if start < min(steps, cfg.stop_after or steps):
        metrics.tracker = build_tracker(**settings["tracker"], run=cfg.run, folder=folder.path, config=settings)
        with metrics:
            if start == 0:
                build.check_experts(trainers, initializers, setup)
            losses = {name: expert.loss for name, expert in experts.items()}
            noise_report.write(folder.path, losses, data.bucket_names, settings)
            evaluations = build_evaluations(setup, trainers, metrics.tracker)
            with out_of_memory(placement.device, lambda: forecast.advice(data, placement.engine)):
                forecast.try_largest(trainers, data, placement.engine)
                ended_by = fit(build.build_run(setup, trainers, checkpoints, monitoring, evaluations), start)
    finish(trainer.stepper for trainer in trainers.values())
    build.compare_replay(folder, settings)
    if ended_by is not None:
        say("stopped by a signal, after a checkpoint; the same command continues")
        raise SystemExit(128 + ended_by)


if __name__ == "__main__":
    main()
