"""Putting a run's pieces together from plain settings: what is trained, what watches it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wantrain import geometry, world
from wantrain.data import SETS
from wantrain.losses import FlowMatching
from wantrain.models import Base, WanVAE, adapters, partial, weights
from wantrain.models.base import stated_expert
from wantrain.models.lora import read_lora
from wantrain.sampling import Sampler, Settings
from wantrain.sampling.generate import Velocity
from wantrain.training.gather import build_sampler
from wantrain.training.loop import Hook, Run
from wantrain.training.preview import Preview
from wantrain.training.trainee import Autoencoder, Trainee
from wantrain.training.validate import ReconstructionValidator, Validator


@dataclass(frozen=True)
class Start:
    """What a run starts from, and what becomes of it.

    make     builds the module with random values
    base     where trained weights lie
    scratch  True passes the base's weights by
    recipe   the recipe's name, for the files that are written
    device, dtype  what weights that stay frozen are loaded to; those that are trained are float32
    """

    make: Callable[[], nn.Module]
    model: Mapping[str, Any]
    expert: Mapping[str, Any]
    adapter: Mapping[str, Any]
    base: Base
    scratch: bool
    seed: int
    device: torch.device
    dtype: torch.dtype
    recipe: str | None = None

    def trainee(self, *, gradient_checkpointing: bool) -> Trainee:
        """The module to train, with its adapter if there is one. ValueError where there is nothing to start from."""
        module = self.module()
        if isinstance(module, WanVAE):
            module = Autoencoder(module)
        else:
            module.gradient_checkpointing = gradient_checkpointing  # type: ignore[assignment]
        settings = self.adapt(module)
        about = {"expert": self.expert["name"], "model": self.model["name"], "boundary": self.model["boundary"]}
        about |= {"base": self.base.name, "recipe": self.recipe, "made_by": world.made_by(), **settings}
        known = {key: str(value) for key, value in about.items() if value is not None and value is not False}
        return Trainee(module, self.expert["part"], known)

    def module(self) -> nn.Module:
        """What the expert starts from: the base's own part, else random values; says which it was.

        ValueError if the base's boundary is not the model's, if what it holds is another expert, if there is neither a
        part nor leave to start from random values, or if an adapter has no base.
        """
        name = self.expert["name"]
        if not self.scratch and self.base.holds(name):
            if name not in self.base.parts:
                self.base.check_boundary(self.model["boundary"])
            module = self._open_vae() if name == "vae" else self._open_transformer(name)
            world.say(f"{name} starts from {self.base.find(name)}")
            return module
        if self.adapter["name"] != "none":
            raise ValueError(
                f"adapter={self.adapter['name']} changes a trained model, but {self.base} holds no {name}; "
                "give weights=FOLDER with a pipeline (assets/wan-tiny is one)"
            )
        if not self.scratch and not self.model["scratch"]:
            raise ValueError(
                f"weights={self.base} holds no {name}; give the folder that does, parts.{name}=, or init=scratch"
            )
        # Parameters are drawn by what is trained, never by what else happened to ask for random numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed_at(self.seed, "weights", name))
            module = self.make()
        world.say(f"{name} starts from random values")
        return module

    def _open_transformer(self, name: str) -> nn.Module:
        kind, fp32 = self.adapter["name"], []
        if kind == "partial":
            with torch.device("meta"):
                names = [name for name, _ in self.make().named_parameters()]
            fp32 = partial.choose(names, layers=self.adapter["layers"], tags=self.adapter["tags"])
        dtype = torch.float32 if kind == "none" else self.dtype
        return self.base.transformer(name, device=self.device, dtype=dtype, fp32=fp32)

    def _open_vae(self) -> nn.Module:
        vae = self.base.vae()
        for part in [vae] if self.expert["trains"] == "all" else [vae.decoder, vae.post_quant_conv]:
            part.requires_grad_(True)
        return vae

    def adapt(self, module: nn.Module) -> dict[str, object]:
        """Put the adapter in, or freeze all but a part; returns the settings as they are (a file to go on from has its
        own)."""
        settings = {key: value for key, value in self.adapter.items() if key not in {"name", "init"}}
        kind = self.adapter["name"]
        if kind == "none":
            return {}
        if kind == "partial":
            partial.train_only(module, **settings)
            return settings
        seed, given = world.seed_at(self.seed, "adapter"), self.adapter["init"]
        if given is None:
            adapters.inject(module, **settings, seed=seed, dora=kind == "dora")
            return settings
        lora = read_lora(given)
        own = "dora" if lora.is_dora else "lora"
        if own != kind:
            raise ValueError(f"adapter.init={given} was trained with adapter={own}; give that, not adapter={kind}")
        stated = lora.metadata.get("expert", self.expert["name"])
        if stated != self.expert["name"]:
            raise ValueError(f"adapter.init={given} was trained for {stated}, not for {self.expert['name']}")
        model = lora.metadata.get("model", self.model["name"])
        if model != self.model["name"]:
            raise ValueError(f"adapter.init={given} was trained for model={model}, not for model={self.model['name']}")
        adapters.inject_lora(module, lora, seed=seed, where=given)
        first = next(iter(lora.layers.values()))
        world.say(
            f"the adapter goes on from {given}: {len(lora.layers)} layers, rank {first.rank}, alpha {first.alpha:g}"
        )
        return {"rank": first.rank, "alpha": first.alpha, "targets": "as in the file"}

    def is_measurable(self) -> bool:
        """True if what is trained is a base's own expert, so that its noise profile should be that expert's."""
        path = None if self.scratch else self.base.find(self.expert["name"])
        return (
            path is not None and self.expert["name"] in {"high_noise", "low_noise"} and stated_expert(path) != "dense"
        )


def make_own_data(shards: Path, *, root: Path) -> None:
    """Make the project's own footage and shards (data/NAME/latents) if they are asked for and not there, and say so.

    Main process only; leaves with the child's exit code where that fails. `root` is the folder of demo.py.
    """
    ours = shards.parent in {Path("data", name) for name in SETS}
    if world.is_main() and ours and not (shards / "manifest.json").is_file():
        world.say(f"making {shards.parent} (procedural clips; once)")
        make = [sys.executable, str(root / "demo.py"), "data", shards.parent.name]
        if code := subprocess.run(make, check=False, env=world.alone()).returncode:
            sys.exit(code)  # the child has said what is wrong


def check_encoders(manifest: Mapping[str, Any], base: Base, shards: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the latents were made by the VAE and text encoder of the base (those that it holds)."""
    loads: dict[str, Callable[[], nn.Module]] = {
        "vae": base.vae,
        "text_encoder": lambda: base.text_encoder(dtype=dtype),
    }
    for what, load in loads.items():
        if not base.holds(what):
            world.say(f"{base} holds no {what}: nobody can say whether {shards} was encoded by the right one")
            continue
        made_by, ours = manifest[f"{what}_fingerprint"], weights.fingerprint(load())
        if made_by != ours:
            raise ValueError(
                f"data.shards={shards} was encoded by another {what} (fingerprint {made_by}, {base} has {ours}); "
                f"encode again with python encode.py and this run's weights= and parts.*=, or give those they were "
                "encoded with"
            )


def build_hooks(
    run: Run,
    *,
    model: Mapping[str, Any],
    base: Base,
    folder: Path,
    validation: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> list[Hook]:
    """What is asked after every step of a run: validation, and previews (into `folder`) if they are wanted."""
    hooks: list[Hook] = [build_validator(run, **validation)]
    if sample["every"] and isinstance(run.loss, FlowMatching):
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


def preview_sampler(run: Run, *, model: Mapping[str, Any], base: Base) -> Sampler:
    """The expert in training together with the other one from the base folder.

    Where the base has no other expert, the one in training answers for every noise level; that is said once.
    """
    expert = str(run.state["expert"])
    others = [name for name in model["experts"] if name != expert]
    models: dict[str, Velocity] = {expert: run.stepper.module}
    if all(base.holds(name) for name in others):
        models.update({name: base.transformer(name, device=run.stepper.device) for name in others})
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
