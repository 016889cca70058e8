"""What a run trains, as modules without values, and the shapes of its clips: before anything is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wantrain import geometry
from wantrain.data import TrainingData, phases_of, read_schedule
from wantrain.data.loading.phases import Order
from wantrain.data.loading.schedule import Entry
from wantrain.data.shards import MANIFEST
from wantrain.models import Base, attention, quantize
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.training.batching import Batching
from wantrain.training.engine.optim import named_trainable
from wantrain.training.initialize import Initializer, without_values
from wantrain.util import devices, distributed
from wantrain.util.console import say

#: Width / height of the clip that stands for footage that is not there yet.
WIDE = 16 / 9


def outline(make: Callable[[], nn.Module], settings: Mapping[str, Any], dtype: torch.dtype) -> nn.Module | None:
    """What an expert trains, with its adapter, frozen and trained as in the run, on the meta device: no weights are
    opened (but an adapter.init's own). None for a VAE whose sizes only its weights say.

    `make` builds the module, `settings` are the expert's own, `dtype` is that of frozen weights.
    """
    start = Initializer.of(make, settings, base=Base(), device=torch.device("meta"), dtype=dtype)
    if not start.is_transformer and "vae" not in start.model:
        return None
    with torch.device("meta"):
        module = without_values(make)
        if start.is_transformer:
            start.set_activations(module)
            if settings["attention"] == "math":  # all others keep as little
                attention.set_kernel(module, attention.Kernel("math", attention.math))
        if stored := start.stored_format(is_fp8=False):  # of a file in fp8 nothing is known yet
            quantize.as_if_loaded(module, stored, start.frozen_dtype)
        start.adapt(module)
    trained = named_trainable(module)
    cast_as_loaded(module, start.frozen_dtype, trained=trained)
    return cast_as_loaded(module, start.trained, trained=dict(module.named_parameters()).keys() - trained.keys())


def check_size(outlines: Mapping[str, nn.Module | None], device: torch.device, asked: str) -> None:
    """Raise ValueError if a transformer of more than a billion parameters would be trained on a CPU that nobody asked
    for; `asked` is device=.
    """
    for name, module in outlines.items():
        if module is not None and name != "vae":
            devices.refuse_large(name, sum(p.numel() for p in module.parameters()), device, asked)


@dataclass(frozen=True)
class Clips:
    """The clips of a run, as far as they exist.

    counts   training clips of each bucket, by its name, "FxHxW" in pixels
    strides  the VAE's over time and space; None where clips are trained on as pixels
    plan     their order; None where the data are not there yet
    micro    of each bucket the most samples of a backward pass, where a schedule has batch sizes of its own; else empty
    entries  of data.schedule; empty without one
    """

    counts: Counter[str]
    strides: tuple[int, int] | None
    plan: Order | None
    micro: Mapping[str, int] = field(default_factory=dict)
    entries: Sequence[Entry] = ()

    @property
    def commonest(self) -> str:
        """The bucket of most clips."""
        return self.counts.most_common(1)[0][0]

    def latent_shape(self, bucket: str) -> tuple[int, int, int]:
        """(latent frames, rows, columns) of a bucket's clips."""
        assert self.strides is not None
        return geometry.latent_shape(geometry.Bucket(*map(int, bucket.split("x"))), *self.strides)


def find_clips(places: Sequence[str], open_data: Callable[[], TrainingData], settings: Mapping[str, Any]) -> Clips:
    """The clips at `places`; where they are not there, or an address cannot be read, one of the model's own size, and
    that is said. Nothing is made. `settings` are train.py's.

    ValueError for shards that are there and damaged, and for a bucket= that the model cannot take.
    """
    if settings["bucket"] is not None:
        return _clip_of_size(_bucket(settings["bucket"], settings["model"]["multiple"]), settings)
    remote = [place for place in places if "://" in place]
    why = [f"{place} is not there yet" for place in places if place not in remote and not _is_finished(place)]
    if not why:
        try:
            return clips_of(open_data(), settings)
        except ValueError as error:
            if not remote:
                raise
            why = [str(error)]
    found = _clip_of_own_size(settings)
    say(f"{'; '.join(why)}: what follows is for a clip of the model's own size, {found.commonest}")
    return found


def _is_finished(place: str) -> bool:
    return (Path(place).expanduser() / MANIFEST).is_file()


def clips_of(data: TrainingData, settings: Mapping[str, Any]) -> Clips:
    """The clips of a data set that is there."""
    encoded = "spatial_stride" in data.manifest
    strides = (data.manifest["temporal_stride"], data.manifest["spatial_stride"]) if encoded else None
    batching = Batching.of_settings(settings, distributed.world_size())
    plan = batching.order(data, settings["seed"])
    return Clips(Counter(data.bucket_names), strides, plan, samples_by_bucket(data, plan, batching), data.schedule)


def samples_by_bucket(data: TrainingData, plan: Order, batching: Batching) -> dict[str, int]:
    """Of each bucket the most samples that a backward pass has in any phase; empty for packs, or without a schedule."""
    most: dict[str, int] = {}
    if batching.tokens is not None or not data.schedule:
        return most
    names = dict(zip(data.buckets.tolist(), data.bucket_names, strict=True))
    for phase in phases_of(plan):
        assert phase.entry is not None
        micro = batching.resized(phase.entry.batch_size).micro
        for name in (names[number] for number in phase.sampler.numbers):
            most[name] = max(micro, most.get(name, 0))
    return most


def _clip_of_own_size(settings: Mapping[str, Any]) -> Clips:
    """One wide clip of the model's own length and area."""
    model = settings["model"]
    size = geometry.sizes(model["area"], model["multiple"], [WIDE])[0]
    return _clip_of_size(geometry.Bucket(model["num_frames"], *size), settings)


def _clip_of_size(bucket: geometry.Bucket, settings: Mapping[str, Any]) -> Clips:
    strides = geometry.Buckets.temporal_stride, settings["model"]["multiple"] // geometry.PATCH[1]
    pixels = settings["expert"]["name"] == "vae"
    schedule = settings["data"].get("schedule")
    entries = () if schedule is None else read_schedule(schedule, settings["data"]["sets"])
    return Clips(Counter([str(bucket)]), None if pixels else strides, None, entries=entries)


def _bucket(text: str, multiple: int) -> geometry.Bucket:
    """The bucket that `bucket=` names, frames x height x width in pixels."""
    parts = str(text).lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"bucket={text} must be frames x height x width in pixels, e.g. 81x480x832")
    bucket = geometry.Bucket(*map(int, parts))
    geometry.check_num_frames(bucket.num_frames, key="bucket")
    geometry.check_size(bucket.height, bucket.width, multiple, key="bucket")
    return bucket
