"""Export of single parts: a trained VAE, or a LoRA in another dialect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from wantrain.data import PixelData
from wantrain.models import load_vae
from wantrain.models.formats.lora import read_lora, write_lora
from wantrain.models.formats.lora_dialects import is_complete
from wantrain.models.formats.weights import write_part
from wantrain.models.vae import measure_latents
from wantrain.runs.folder import TrainedExpert
from wantrain.util.console import say
from wantrain.util.files import claim_folder

#: Frames of a clip that latents are measured on, at most: whole clips, where training may use parts of them.
LONGEST = 81
#: Clips encoded at once for that.
TOGETHER = 8


def convert_lora(
    source: Path, target: Path, dialect: str, about: Mapping[str, object], *, alpha: float | None = None
) -> None:
    """Write a LoRA file in another dialect, with its own metadata and `about`.

    ValueError if its metadata names another expert.
    """
    lora = read_lora(source, alpha=alpha)
    stated = lora.metadata.get("expert", about["expert"])
    if stated != about["expert"]:
        raise ValueError(f"lora.{about['expert']}={source} was trained for {stated}; give it as lora.{stated}=")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_lora(target, lora.layers, dialect=dialect, metadata={**about, **lora.metadata})
    if lora.is_dora and dialect != "diffusers":
        say(
            f"note: {target} is a DoRA: diffusers takes those as lora.dialect=diffusers; ComfyUI divides by the "
            "lengths of the base's rows, not the changed ones (its pull request 15458): give it the merged model"
        )
    elif dialect == "kohya" and not is_complete(lora.layers):
        say(f"note: {target} is not all ten layers of every block: diffusers will refuse it in kohya's dialect")
    elif dialect == "comfyui" and not all(name.startswith("blocks.") for name in lora.layers):
        say(f"note: {target} changes layers outside the blocks: diffusers takes those as lora.dialect=diffusers")
    say(f"wrote {target} ({dialect}; sample.py lora.EXPERT=FILE)")


def export_vae(trained: TrainedExpert, out: Path, *, measure: Path | None) -> None:
    """Write a trained VAE, with the mean and standard deviation of its latents measured on the video shards `measure`
    (None: its training clips).

    It is stored as float16: half the size, with a rounding far below the VAE's own error. If only the decoder was
    trained, the latents' statistics stay as they were.
    """
    vae, settings = load_vae(trained.checkpoint), trained.config["data"]
    mean, std = vae.latents_mean, vae.latents_std
    if trained.config["expert"]["trains"] == "all":
        size = {key: settings[key] for key in ("area", "multiple", "holdout", "seed")}
        data = PixelData(shards=measure or settings["shards"], num_frames=LONGEST, **size)
        mean, std = measure_latents(vae, whole_clips(data))
    claim_folder(out / "vae", sentinel="config.json", key="out")
    tensors = {key: tensor.half() for key, tensor in vae.state_dict().items()}
    write_part(out / "vae", {**vae.config(), "latents_mean": list(mean), "latents_std": list(std)}, tensors)
    say(f"wrote {out / 'vae'}")


def whole_clips(data: PixelData) -> Iterator[Tensor]:
    """Pixels of all training clips, several of one bucket at a time: single small clips take six times as long."""
    for bucket in np.unique(data.buckets):
        clips = np.flatnonzero(data.buckets == bucket)
        for start in range(0, len(clips), TOGETHER):
            some = clips[start : start + TOGETHER]
            yield data.load(some, [0] * len(some)).pixels_BCFHW
