"""Export of single parts: a trained VAE, and LoRAs in another dialect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from wantrain.data import PixelData
from wantrain.models import load_vae
from wantrain.models.formats.export_folder import claim_export, staged
from wantrain.models.formats.lora import LoRA, write_lora
from wantrain.models.formats.lora_dialects import is_complete
from wantrain.models.formats.lora_expert import noise_named
from wantrain.models.formats.lora_peft import lora_file
from wantrain.models.formats.weights import write_part
from wantrain.models.vae import measure_latents
from wantrain.runs.folder import TrainedExpert
from wantrain.runs.loras import Lora, LoraSettings
from wantrain.util.console import say
from wantrain.util.files import check_writable

#: Frames of a clip that latents are measured on, at most: whole clips, where training may use parts of them.
LONGEST = 81
#: Clips encoded at once for that.
TOGETHER = 8


def convert_loras(settings: LoraSettings, out: Path, dialect: str, *, overwrite: bool = False) -> None:
    """Write each LoRA file of `settings` into the folder `out` in a dialect, its strength multiplied in.

    The names have the expert, unless the file's own name says it. ValueError, before anything is written, for a file of
    another expert, for one that exists already (unless `overwrite`), and for one that would replace its own source.
    """
    by_target: dict[Path, tuple[str, Lora, LoRA]] = {}
    given = settings.over({}, list(settings.files))
    sources = {name: [lora_file(lora.path) for lora in loras] for name, loras in given.items()}
    for name, loras in given.items():
        for lora in loras:
            read, target = lora.read(name), _free_name(out, name, lora.path, dialect, taken=by_target)
            if target.exists():
                _check_replaced(target, sources, overwrite)
            by_target[target] = name, lora, read
    settings.check_used([given])
    check_writable(out, key="out")
    for target, (name, lora, read) in by_target.items():
        write_converted(target, read, lora.strength, dialect, {"expert": name})
        say(f"wrote {target} ({dialect}; sample.py lora.{name}=FILE)")


def _check_replaced(target: Path, sources: Mapping[str, Sequence[Path]], overwrite: bool) -> None:
    """ValueError unless a file may be replaced: it is none of those that are read, and `overwrite` is true."""
    for name, files in sources.items():
        if file := next((file for file in files if target.samefile(file)), None):
            raise ValueError(f"lora.{name}={file} would be replaced by what is written; give another out=")
    if not overwrite:
        raise ValueError(f"{target} is there already; give another out=, or overwrite=true")


def _free_name(out: Path, expert: str, source: Path, dialect: str, *, taken: Mapping[Path, object]) -> Path:
    """The name of a converted file, which no other of the same call has."""
    stem = source.stem if expert == "dense" or noise_named(source.stem) == expert else f"{source.stem}_{expert}"
    names = (out / f"{stem}{number}_{dialect}.safetensors" for number in ("", *(f"_{n}" for n in range(2, 1000))))
    return next(name for name in names if name not in taken)


def write_converted(target: Path, lora: LoRA, strength: float, dialect: str, about: Mapping[str, object]) -> None:
    """Write a LoRA in a dialect, `strength` multiplied in, with its own metadata and `about`.

    Says which tools will not load it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    layers = {name: layer if strength == 1 else layer.scaled(strength) for name, layer in lora.layers.items()}
    more = {} if strength == 1 else {"lora_scale": strength}
    write_lora(target, layers, dialect=dialect, metadata={**about, **lora.metadata, **more})
    if lora.is_dora and dialect != "diffusers":
        say(
            f"note: {target.name} is a DoRA: diffusers takes those as lora.dialect=diffusers; ComfyUI divides by the "
            "lengths of the base's rows, not the changed ones (its pull request 15458): give it the merged model"
        )
    elif dialect == "kohya" and not is_complete(lora.layers):
        say(f"note: {target.name} is not all ten layers of every block: diffusers will refuse it in kohya's dialect")
    elif dialect == "comfyui" and not all(name.startswith("blocks.") for name in lora.layers):
        say(f"note: {target.name} changes layers outside the blocks: diffusers takes those as lora.dialect=diffusers")


def export_vae(trained: TrainedExpert, out: Path, *, measure: Path | None, overwrite: bool = False) -> None:
    """Write a trained VAE into `out`/vae, with the mean and standard deviation of its latents measured on the video
    shards `measure` (None: its training clips). `overwrite` as for `claim_export`.

    It is stored as float16: half the size, with a rounding far below the VAE's own error. If only the decoder was
    trained, the latents' statistics stay as they were.
    """
    claim_export(out / "vae", "vae", reads=[trained.checkpoint], overwrite=overwrite)
    vae, settings = load_vae(trained.checkpoint), trained.config["data"]
    mean, std = vae.latents_mean, vae.latents_std
    if trained.config["expert"]["trains"] == "all":
        size = {key: settings[key] for key in ("area", "multiple", "holdout", "seed")}
        data = PixelData(shards=measure or settings["shards"], num_frames=LONGEST, **size)
        mean, std = measure_latents(vae, whole_clips(data))
    tensors = {key: tensor.half() for key, tensor in vae.state_dict().items()}
    with staged(out / "vae", "vae") as folder:
        write_part(folder, {**vae.config(), "latents_mean": list(mean), "latents_std": list(std)}, tensors)
    say(f"wrote {out / 'vae'}")


def whole_clips(data: PixelData) -> Iterator[Tensor]:
    """Pixels of all training clips, several of one bucket at a time: single small clips take six times as long."""
    for bucket in np.unique(data.buckets):
        clips = np.flatnonzero(data.buckets == bucket)
        for start in range(0, len(clips), TOGETHER):
            some = clips[start : start + TOGETHER]
            yield data.load(some, [0] * len(some)).pixels_BCFHW
