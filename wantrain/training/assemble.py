"""Putting a run's pieces together from plain settings: what is trained, what watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wantrain import geometry, world
from wantrain.losses import FlowMatching, Reconstruction
from wantrain.models import WanVAE, adapters, load_text_encoder, load_transformer, load_vae, pipeline, weights
from wantrain.sampling import Settings
from wantrain.sampling.generate import Velocity
from wantrain.training.gather import build_sampler
from wantrain.training.loop import Hook
from wantrain.training.metrics import Tracker
from wantrain.training.parallel import Stepper
from wantrain.training.preview import Preview
from wantrain.training.trainee import Autoencoder, Trainee
from wantrain.training.validate import ReconstructionValidator, Validator


def build_trainee(
    make: Callable[[], nn.Module],
    *,
    model: Mapping[str, Any],
    expert: Mapping[str, Any],
    adapter: Mapping[str, Any],
    base: Path,
    seed: int,
    gradient_checkpointing: bool,
) -> Trainee:
    """The module to train: from the base folder where it holds that part, else from `make()` if the model allows it.

    Says which of the two it was. ValueError where there is nothing to start from, or an adapter has no base.
    """
    present = (base / expert["part"] / "config.json").is_file() and expert["name"] != "vae"
    if present:
        pipeline.check_boundary(base, model["boundary"])
        module: nn.Module = load_transformer(base, part=expert["part"])
        world.say(f"{expert['name']} starts from {base / expert['part']}")
    elif adapter["name"] != "none":
        raise ValueError(
            f"adapter={adapter['name']} changes a trained model, but {base} holds no {expert['part']}/; "
            "give weights=FOLDER with a pipeline (python demo.py makes one: weights=runs/demo/pipeline)"
        )
    elif not model["scratch"]:
        raise ValueError(
            f"weights={base} holds no {expert['part']}/ for expert={expert['name']}; give the folder that does"
        )
    else:
        # Parameters are drawn by what is trained, never by what else happened to ask for random numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed_at(seed, "weights", expert["name"]))
            module = make()
        world.say(f"{expert['name']} starts from random values ({base} holds no {expert['part']}/ to start from)")
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


def check_encoders(manifest: Mapping[str, Any], base: Path, shards: str) -> None:
    """Raise ValueError unless the latents were made by the VAE and text encoder of the base folder."""
    for what, load in (("vae", load_vae), ("text_encoder", load_text_encoder)):
        made_by, ours = manifest[f"{what}_fingerprint"], weights.fingerprint(load(base))
        if made_by != ours:
            raise ValueError(
                f"data.shards={shards} was encoded by another {what} (fingerprint {made_by}, {base} has {ours}); "
                f"encode again with python encode.py weights={base}, or give the weights= they were encoded with"
            )


def build_validator(
    stepper: Stepper, loss: FlowMatching | Reconstruction, data: Any, *, every: int, clips: int, points: int,
    steps: int, seed: int,
) -> Hook:  # fmt: skip
    """The validation hook that goes with the loss, over the first `clips` held-out clips (grouped by bucket)."""
    batches = data.heldout_batches(clips)
    if not batches:
        world.say("no clips are held out (data.holdout is 0, or there are too few files): there is no validation")
    if isinstance(loss, Reconstruction):
        return ReconstructionValidator(stepper, loss, batches, every, steps)
    return Validator(stepper, loss, batches, every, steps, points, seed)


def build_preview(
    stepper: Stepper, *, model: Mapping[str, Any], expert: str, base: Path, prompts: list[str], shift: float,
    solver_steps: int, seed: int, every: int, steps: int, folder: Path, tracker: Tracker,
) -> Preview:  # fmt: skip
    """The preview hook: the expert in training together with the other one from the base folder.

    Where the base has no other expert, the one in training answers for every noise level; that is said once.
    """
    others = pipeline.held_experts(base, [name for name in model["experts"] if name != expert])
    missing = [name for name in model["experts"] if name != expert and name not in others]
    if missing:
        world.say(f"previews: {base} holds no {missing[0]}, so {expert} answers for every noise level")
    models: dict[str, Velocity] = {expert: stepper.module}
    if not missing:
        models.update(pipeline.load_experts(base, others, device=stepper.device))
    sampler = build_sampler(models, boundary=model["boundary"], base=base, device=stepper.device)
    settings = Settings(
        guidance=model["guidance"], shift=shift, steps=solver_steps, negative_prompt=model["negative_prompt"]
    )
    sampler.warm([*prompts, settings.negative_prompt])
    height, width = geometry.sizes(model["area"], model["multiple"], [1.0])[0]
    bucket = geometry.Bucket(model["num_frames"], height, width)
    return Preview(stepper, sampler, settings, prompts, bucket, model["fps"], seed, every, steps, folder, tracker)


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line; empty lines are skipped. ValueError for an absent or empty file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"the prompt file {path} does not exist")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt; write one per line")
    return prompts
