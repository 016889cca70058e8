"""Putting a run's pieces together from plain settings: what is trained, what watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wantrain import geometry, world
from wantrain.losses import FlowMatching
from wantrain.models import WanVAE, adapters, load_text_encoder, load_transformer, load_vae, pipeline, weights
from wantrain.sampling import Sampler, Settings
from wantrain.sampling.generate import Velocity
from wantrain.training.gather import build_sampler
from wantrain.training.loop import Hook, Run
from wantrain.training.preview import Preview
from wantrain.training.trainee import Autoencoder, Trainee
from wantrain.training.validate import ReconstructionValidator, Validator

#: What `init_from` says for a start from random values.
RANDOM = Path("random")


def build_trainee(
    make: Callable[[], nn.Module],
    *,
    model: Mapping[str, Any],
    expert: Mapping[str, Any],
    adapter: Mapping[str, Any],
    base: Path | None,
    init_from: Path | None,
    seed: int,
    gradient_checkpointing: bool,
) -> Trainee:
    """The module to train, with its adapter if there is one; see `starting_module`."""
    module = starting_module(
        make, model=model, expert=expert, adapter=adapter, base=base, init_from=init_from, seed=seed
    )
    if isinstance(module, WanVAE):
        module = Autoencoder(module)
    else:
        module.gradient_checkpointing = gradient_checkpointing  # type: ignore[assignment]
    if adapter["name"] == "lora":
        lora_seed = world.seed_at(seed, "adapter")
        adapters.inject(
            module, rank=adapter["rank"], alpha=adapter["alpha"], targets=adapter["targets"], seed=lora_seed
        )
    metadata = {key: value for key, value in adapter.items() if key != "name"}
    about = {"expert": expert["name"], "model": model["name"], "boundary": model["boundary"], **metadata}
    return Trainee(module, expert["part"], {key: value for key, value in about.items() if value is not None})


def starting_module(
    make: Callable[[], nn.Module],
    *,
    model: Mapping[str, Any],
    expert: Mapping[str, Any],
    adapter: Mapping[str, Any],
    base: Path | None,
    init_from: Path | None,
    seed: int,
) -> nn.Module:
    """What the expert starts from: the transformer at `init_from`, else the base folder's own part, else `make()`.

    `init_from` may be the word random, which passes the base's part by. Says which it was. ValueError where there is
    nothing to start from, or an adapter has no base.
    """
    if init_from is not None and init_from != RANDOM:
        # Some other model's transformer, as Wan2.2's low-noise expert began as Wan2.1: no boundary to compare.
        module: nn.Module = load_transformer(init_from)
        if module.config() != make().config():  # type: ignore[attr-defined, operator]
            raise ValueError(f"init_from={init_from} holds a transformer of another shape than model={model['name']}")
        world.say(f"{expert['name']} starts from {init_from}")
        return module
    if base is not None and init_from != RANDOM and (base / expert["part"] / "config.json").is_file():
        pipeline.check_boundary(base, model["boundary"])
        world.say(f"{expert['name']} starts from {base / expert['part']}")
        if expert["name"] == "vae":
            vae = load_vae(base)
            trained = [vae] if expert["trains"] == "all" else [vae.decoder, vae.post_quant_conv]
            for part in trained:
                part.requires_grad_(True)
            return vae
        return load_transformer(base, part=expert["part"])
    if adapter["name"] != "none":
        raise ValueError(
            f"adapter={adapter['name']} changes a trained model, but {base} holds no {expert['part']}/; "
            "give weights=FOLDER with a pipeline (assets/wan-tiny is one)"
        )
    if not model["scratch"]:
        raise ValueError(
            f"weights={base} holds no {expert['part']}/ for expert={expert['name']}; give the folder that does"
        )
    # Parameters are drawn by what is trained, never by what else happened to ask for random numbers before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed_at(seed, "weights", expert["name"]))
        module = make()
    world.say(f"{expert['name']} starts from random values")
    return module


def check_encoders(manifest: Mapping[str, Any], base: Path, shards: str) -> None:
    """Raise ValueError unless the latents were made by the VAE and text encoder of the base folder."""
    for what, load in (("vae", load_vae), ("text_encoder", load_text_encoder)):
        made_by, ours = manifest[f"{what}_fingerprint"], weights.fingerprint(load(base))
        if made_by != ours:
            raise ValueError(
                f"data.shards={shards} was encoded by another {what} (fingerprint {made_by}, {base} has {ours}); "
                f"encode again with python encode.py weights={base}, or give the weights= they were encoded with"
            )


def build_hooks(
    run: Run,
    *,
    model: Mapping[str, Any],
    base: Path | None,
    folder: Path,
    validation: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> list[Hook]:
    """What is asked after every step of a run: validation, and previews (into `folder`) if they are wanted."""
    hooks: list[Hook] = [build_validator(run, **validation)]
    if sample["every"] and base is not None and isinstance(run.loss, FlowMatching):
        prompts = read_prompts(sample["prompts"]) if sample["prompts"] else run.data.captions()
        settings = Settings(
            guidance=model["guidance"],
            shift=run.loss.shift,
            steps=sample["steps"],
            negative_prompt=model["negative_prompt"],
        )
        sampler = preview_sampler(run, model=model, base=base)
        size = geometry.sizes(model["area"], model["multiple"], [1.0])[0]
        hooks.append(
            Preview(
                run.stepper,
                sampler,
                settings,
                prompts=prompts[: sample["count"]],
                bucket=geometry.Bucket(model["num_frames"], *size),
                fps=model["fps"],
                seed=sample["seed"],
                every=sample["every"],
                steps=run.steps,
                folder=folder,
                tracker=run.metrics.tracker,
            )
        )
    return hooks


def build_validator(run: Run, *, every: int, clips: int, points: int) -> Hook:
    """The validation hook that goes with the run's loss, over at most `clips` held-out clips."""
    batches = run.data.heldout_batches(clips)
    if not batches:
        world.say("no clips are held out (data.holdout is 0, or there are too few files): there is no validation")
    if isinstance(run.loss, FlowMatching):
        return Validator(run.stepper, run.loss, batches, every, run.steps, points, run.seed)
    return ReconstructionValidator(run.stepper, batches, every, run.steps)


def preview_sampler(run: Run, *, model: Mapping[str, Any], base: Path) -> Sampler:
    """The expert in training together with the other one from the base folder.

    Where the base has no other expert, the one in training answers for every noise level; that is said once.
    """
    expert = str(run.state["expert"])
    others = [name for name in model["experts"] if name != expert]
    models: dict[str, Velocity] = {expert: run.stepper.module}
    if pipeline.held_experts(base, others) == others:
        models.update(pipeline.load_experts(base, others, device=run.stepper.device))
    else:
        world.say(f"previews: {base} holds no {others[0]}, so {expert} answers for every noise level")
    return build_sampler(models, boundary=model["boundary"], base=base, device=run.stepper.device)


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line; empty lines are skipped. ValueError for an absent or empty file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"the prompt file {path} does not exist")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt; write one per line")
    return prompts
