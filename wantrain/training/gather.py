"""Bringing experts together: from runs, from pipeline folders, with LoRAs added. Used by sample.py and export.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wantrain import world
from wantrain.models import WanTransformer, adapters, load_text_encoder, load_transformer, load_vae, pipeline
from wantrain.sampling import Experts, Sampler
from wantrain.sampling.generate import Velocity
from wantrain.training.run import TrainedExpert, trained_experts


@dataclass(frozen=True)
class Gathered:
    """Experts by name, the folder that the other parts come from, and the runs they came from (if any)."""

    experts: dict[str, WanTransformer]
    base: Path
    trained: tuple[TrainedExpert, ...] = ()


def gather_experts(
    names: list[str],
    *,
    model: str,
    boundary: float | None,
    run: str | None,
    runs: str | Path,
    weights: str | None,
    locate: Callable[[str | Path], Path],
    alone: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Gathered:
    """The experts `names` of `model`: those that `run` trained, the others from `weights` or the runs' own base.

    ValueError where one is missing (unless `alone` allows a single expert), or a run trained another model.
    """
    if run is None and weights is None:
        raise ValueError("nothing to load: give run=NAME (or run=NAME,NAME) or weights=FOLDER")
    trained = trained_experts(run, runs) if run is not None else []
    for expert in trained:
        if expert.config["model"]["name"] != model:
            raise ValueError(
                f"run {run} trained model={expert.config['model']['name']}, not model={model}; add model= to match"
            )
    base = locate(weights if weights is not None else trained[0].config["weights"])
    if not base.is_dir():
        raise ValueError(f"weights={base} is not a folder; give one in the diffusers layout")
    experts = {expert.name: load_trained(expert, base, locate, device, dtype) for expert in trained}
    rest = [name for name in names if name not in experts]
    held = pipeline.held_experts(base, rest)
    if held:
        pipeline.check_boundary(base, boundary)
        experts.update(pipeline.load_experts(base, held, device=device, dtype=dtype))
    missing = [name for name in rest if name not in held]
    if missing and not (alone and experts):
        raise ValueError(
            f"{', '.join(missing)} is missing: neither run={run} nor {base} has it. Give both runs (run=ONE,OTHER), or "
            "weights= with a pipeline that holds it; sample.py alone=true lets one expert answer for every noise level"
        )
    if missing:
        world.say(f"alone=true: {', '.join(experts)} answers for every noise level; it was trained for its own only")
    return Gathered({name: experts[name] for name in names if name in experts}, base, tuple(trained))


def load_trained(
    expert: TrainedExpert,
    base: Path,
    locate: Callable[[str | Path], Path],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanTransformer:
    """The expert of a checkpoint; an adapter is merged into the base it was trained on."""
    part = pipeline.PARTS[expert.name]
    if expert.adapter is None:
        return load_transformer(expert.checkpoint, part=part, device=device, dtype=dtype)
    own_base = locate(expert.config["weights"])
    module = load_transformer(own_base if own_base.is_dir() else base, part=part, device=device, dtype=dtype)
    adapters.merge_file(expert.adapter, module, expert=expert.name)
    return module


def add_loras(experts: Mapping[str, WanTransformer], files: Mapping[str, str | None], scale: float) -> None:
    """Merge LoRA files into the experts they are named for. ValueError for an expert that is not there."""
    for name, file in files.items():
        if file is None:
            continue
        if name not in experts:
            raise ValueError(f"lora.{name}={file}: this model has {', '.join(experts)}, no {name}")
        count = adapters.merge_file(file, experts[name], scale=scale, expert=name)
        world.say(f"{name}: {file} added to {count} layers at scale {scale}")


def build_sampler(
    models: Mapping[str, Velocity],
    *,
    boundary: float | None,
    base: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Sampler:
    """A Sampler over given experts, with VAE (always float32) and text encoder from the base folder."""
    # The text encoder stays on the host: it runs once per prompt, and its memory is the transformers'.
    vae, text = load_vae(base, device=device), load_text_encoder(base, dtype=dtype)
    return Sampler(
        Experts(models, boundary),
        text.encode_unpadded,
        vae.decode,
        vae.z_dim,
        vae.temporal_stride,
        vae.spatial_stride,
        device,
    )
