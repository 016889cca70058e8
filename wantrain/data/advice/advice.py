"""Which settings fit a folder of footage, and why; and what in it is likely to be trouble.

The rules hold what the documents of the project say of footage; none was measured on published weights.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wantrain import geometry
from wantrain.data.advice.overview import Overview
from wantrain.data.footage.accounting import DatasetStats
from wantrain.data.footage.clips import ClipOptions
from wantrain.data.footage.selection import ClipSelector
from wantrain.data.footage.sharding import ShardOptions

#: Recipes of purposes by the name of the model; the first is advised (conf/recipe, docs/recipes.md).
RECIPES: Mapping[str, tuple[str, ...]] = {
    "t2v_a14b": ("character", "style", "motion"),
    "i2v_a14b": ("i2v_character", "i2v_style", "i2v_motion"),
    "ti2v_5b": ("ti2v_5b_lora",),
    "t2v_1_3b": ("t2v_1_3b_lora",),
}
#: Clips that the recipes ask for, at least.
FEW = 20
#: Lengths of clips beyond which `lengths` names a few: each length is a bucket of its own.
MOST_LENGTHS = 4
#: Share of the picture beyond which a crop is worth a bucket of the footage's own shape.
CROPPED = 0.1
#: The share of files held out by default (conf/data/latents.yaml).
HOLDOUT = 0.05
#: Below so many frames per second of the model's, frames are shown twice.
SLOW = 0.95


class Setting(NamedTuple):
    """A setting of a command, with the reason; command "" for those above the sections of a settings file."""

    command: str
    key: str
    value: Any
    why: str = ""

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.command}: {self.key}={value}" if self.command else f"{self.key}={value}"


@dataclass(frozen=True)
class Places:
    """Where things lie: the settings file is `file`, and all else has its stem as its name."""

    file: Path

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def videos(self) -> Path:
        return Path("data") / self.name / "videos"

    @property
    def latents(self) -> Path:
        return Path("data") / self.name / "latents"


@dataclass
class Advice:
    """Settings for a folder, what is likely to be trouble, and the counts of clips with these settings."""

    settings: list[Setting]
    trouble: list[str] = field(default_factory=list)
    stats: DatasetStats = field(default_factory=DatasetStats)


def advise(overview: Overview, model: Mapping[str, Any], sizes: geometry.Buckets, places: Places) -> Advice:
    """Settings of every command for the footage of an overview.

    model  the model's facts (conf/model)
    sizes  the buckets that encode.py has for this model by default
    """
    clips = [*_lengths(overview, model), *_scenes(overview), *_kinds(overview)]
    selector, used = overview.select(_options(clips, model))
    buckets, small = _sizes(used, sizes)
    count = selector.stats.clips.used
    settings = [
        Setting("", "model", model["name"]),
        Setting("", "run", places.name, "name of the run, in runs/"),
        Setting("caption", "source", str(overview.source)),
        Setting("caption", "template", "plain", "or character, motion, style, with trigger: WORD (docs/data.md)"),
        Setting("shard", "source", str(overview.source)),
        Setting("shard", "out", str(places.videos)),
        *clips,
        Setting("encode", "shards", str(places.videos)),
        Setting("encode", "out", str(places.latents)),
        *buckets,
        Setting("train", "data.shards", str(places.latents)),
        *_training(overview, model, count, selector.stats.files.used),
        *_sampling(overview, model, used, sizes, places),
        Setting("export", "out", f"runs/{places.name}/pipeline", "the pipeline with the LoRA, and the LoRA alone"),
        *([Setting("export", "dtype", "bf16", "half the bytes of fp32")] if is_large(model) else []),
    ]  # fmt: skip
    return Advice(settings, [*_trouble(overview, model, selector), *small], selector.stats)


def is_large(model: Mapping[str, Any]) -> bool:
    """Whether a model is one of the published ones, which compute in bf16; the tiny ones do not."""
    return bool(model["precision"] == "bf16")


def _options(settings: Iterable[Setting], model: Mapping[str, Any]) -> ShardOptions:
    chosen = {each.key: each.value for each in settings}
    clips = ClipOptions(chosen["num_frames"], model["fps"], lengths=tuple(chosen.get("lengths", ())))
    choices = {key: chosen[key] for key in ("scenes", "static", "interlaced") if key in chosen}
    return ShardOptions(model["name"], clips, **choices)


# ------------------------------------------------------------------------------------------------- how clips are cut


def _lengths(overview: Overview, model: Mapping[str, Any]) -> list[Setting]:
    """The longest length that at least half of the scenes fill, and a few lengths where there would be many."""
    fps, most = model["fps"], model["num_frames"]
    found = [geometry.floor_num_frames(int(each * fps)) for video in overview.videos for each in video.scenes]
    filled = sorted((frames for frames in found if frames >= 5), reverse=True)
    if not overview.videos:
        return [Setting("shard", "num_frames", 1, "stills only: they teach what things look like, and no motion")]
    if not filled:
        return [Setting("shard", "num_frames", most)]
    longest = min(most, filled[(len(filled) - 1) // 2])
    reach = sum(frames >= longest for frames in filled)
    whose = f"{reach} of {len(found)} {'scenes' if len(found) > len(overview.videos) else 'videos'}"
    why = f"the longest clip that half of the footage fills ({whose}); the model's is {most}"
    if longest == most:
        why = f"the model's longest clip, {most / fps:.3g} s; {whose} fill it"
    settings = [Setting("shard", "num_frames", longest, why)]
    lengths = {min(frames, longest) for frames in filled}
    if len(lengths) > MOST_LENGTHS:
        parts = {max(5, geometry.floor_num_frames(longest // part)) for part in (1, 2, 4)}
        own = sorted(parts | ({1} if overview.images else set()))
        why = (
            f"{len(lengths)} lengths would each be a bucket of its own; footage beyond the next shorter one is left out"
        )
        settings.append(Setting("shard", "lengths", own, why))
    return settings


def _scenes(overview: Overview) -> list[Setting]:
    if not (overview.split and overview.videos):
        return []
    cut = [video for video in overview.videos if len(video.scenes) > 1]
    cuts = sum(len(video.scenes) - 1 for video in cut)
    why = (
        f"{cuts} cuts in {len(cut)} videos: no clip is to contain one" if cuts else "no cut was found; no clip has one"
    )
    return [Setting("shard", "scenes", "split", why)]


def _kinds(overview: Overview) -> list[Setting]:
    """Settings for files that are special."""
    settings, videos = [], overview.videos
    if interlaced := [video.name for video in videos if video.interlaced]:
        settings.append(Setting("shard", "interlaced", "deinterlace", f"{_named(interlaced)}: interlaced"))
    still = [video.name for video in videos if video.still]
    if still and len(still) < len(videos):
        settings.append(
            Setting("shard", "static", "drop", f"{_named(still)}: nothing moves, which teaches to stand still")
        )
    return settings  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- sizes


def _sizes(used: Sequence[Mapping[str, Any]], sizes: geometry.Buckets) -> tuple[list[Setting], list[str]]:
    """Areas and shapes beside the default ones where the footage asks for them; and trouble with its sizes."""
    settings, trouble, shapes = [], list[str](), [(about["height"], about["width"]) for about in used]
    (area,) = sizes.areas
    small = [shape for shape in shapes if _enlarged(shape, area, sizes) > sizes.upscale]
    if small:
        choices = [area // part for part in (2, 4, 8, 16) if area // part >= 4 * sizes.multiple**2]
        fitting = {each: sum(_enlarged(shape, each, sizes) <= sizes.upscale for shape in small) for each in choices}
        best = max(fitting, key=lambda each: (fitting[each], each), default=None)
        if best is not None and fitting[best]:
            why = f"{fitting[best]} files are too small for {area} pixels a frame: they get {best}"
            settings.append(Setting("encode", "area", [area, best], why))
        if left := len(small) - (fitting[best] if best is not None else 0):
            trouble.append(
                f"{left} files would be enlarged more than {sizes.upscale:g} times: encode.py leaves them out; give "
                "larger files, or encode: area and upscale.limit"
            )
    cropped = Counter(
        round(width / height, 3)
        for height, width in shapes
        if geometry.cover(height, width, *_nearest((height, width), area, sizes))[2] > CROPPED
    )
    if cropped:
        own = [aspect for aspect, _ in cropped.most_common(2)]
        why = (
            f"{cropped.total()} files would lose more than {CROPPED:.0%} of the picture: "
            f"{' and '.join(f'{aspect:g}' for aspect in own)} (width / height) added"
        )
        settings.append(Setting("encode", "aspects", [*sizes.aspects, *own], why))
    return settings, trouble


def _nearest(shape: tuple[int, int], area: int, sizes: geometry.Buckets) -> tuple[int, int]:
    return geometry.nearest_size(*shape, geometry.sizes(area, sizes.multiple, sizes.aspects))


def _enlarged(shape: tuple[int, int], area: int, sizes: geometry.Buckets) -> float:
    return geometry.enlargement(*shape, *_nearest(shape, area, sizes))


# -------------------------------------------------------------------------------------------- training and sampling


def _training(overview: Overview, model: Mapping[str, Any], clips: int, files: int) -> list[Setting]:
    settings, recipes = [], RECIPES.get(model["name"], ())
    if recipes:
        others = f"or {' or '.join(recipes[1:])}: " if recipes[1:] else ""
        stills = "; motion needs videos" if not overview.videos and recipes[1:] else ""
        settings.append(Setting("train", "recipe", recipes[0], f"{others}what each is for: docs/recipes.md{stills}"))
    else:
        expert = "both" if len(model["experts"]) > 1 else model["experts"][0]
        why = "both experts in one job" if expert == "both" else ""
        settings += [Setting("train", "expert", expert, why), Setting("train", "adapter", "lora")]
        if not is_large(model):
            settings.append(
                Setting("train", "optimizer.lr", 1.5e-3, "a small model learns at a higher rate, as in the demo")
            )
        if 0 < clips < model["train"]["batch_size"]:
            settings.append(Setting("train", "batch_size", clips, "no clip twice in one step"))
    held = round(HOLDOUT * files)
    if held == 0 and files >= 4:
        share = round(1 / files, 3)
        settings.append(Setting("train", "data.holdout", share, f"one of {files} files is kept back for validation"))
        held = 1
    if held and not recipes:
        settings.append(
            Setting("train", "sample.every", max(1, model["steps"] // 2), "steps between previews on the run's page")
        )
    if is_large(model):
        settings.append(Setting("train", "memory", "auto", "memory settings are chosen for the card that is there"))
    settings.append(Setting("train", "tracker", "jsonl", "the run's page needs no account; or wandb, tensorboard"))
    return settings  # fmt: skip


def _sampling(
    overview: Overview,
    model: Mapping[str, Any],
    used: Sequence[Mapping[str, Any]],
    sizes: geometry.Buckets,
    places: Places,
) -> list[Setting]:
    settings = [Setting("sample", "out", f"samples/{places.name}")]
    caption = next((each.caption for each in [*overview.videos, *overview.images] if each.caption), None)
    if caption is not None:
        settings.append(Setting("sample", "prompt", caption, "a caption of the footage; write your own"))
    if is_large(model) and used:
        shapes = Counter(_nearest((about["height"], about["width"]), sizes.areas[0], sizes) for about in used)
        (height, width), _ = shapes.most_common(1)[0]
        why = "the size that most of the footage has in training"
        settings += [
            Setting("sample", "height", height, why), Setting("sample", "width", width),
            Setting("sample", "offload.experts", "disk", "less memory, more time (docs/sampling.md)"),
            Setting("sample", "offload.blocks", True),
        ]  # fmt: skip
    return settings


# --------------------------------------------------------------------------------------------------------- trouble


def _trouble(overview: Overview, model: Mapping[str, Any], selector: ClipSelector) -> list[str]:
    """What the settings do not solve."""
    found, videos, clips = list[str](), overview.videos, selector.stats.clips.used
    if overview.without:
        found.append(
            f"{_named(overview.without)}: no caption; python caption.py config=FILE writes them, or give "
            "shard: caption.missing"
        )
    elif len(overview.captions) > 1 and len(set(overview.captions)) == 1:
        found.append("all captions are the same, so that nothing but this text calls up what is learned")
    if clips < FEW:
        found.append(f"{clips} clips are few: the recipes ask for {FEW} and more, and a LoRA repeats what it saw often")
    slow = [video.name for video in videos if video.rate < SLOW * model["fps"]]
    if slow:
        found.append(
            f"{_named(slow)}: fewer frames per second than the model's {model['fps']:g}, so frames stand twice, which "
            "teaches to stutter; take footage of a higher rate"
        )
    if videos and not overview.split:
        found.append("scene changes were not looked for: pip install 'wantrain[scenes]', then init= again")
    if videos and all(video.still for video in videos):
        found.append("nothing moves in any video: they teach to stand still")
    if not videos:
        found.append("there are stills only: add clips to keep the motion, which a LoRA of stills may lose")
    elif overview.images:
        found.append(f"{len(overview.images)} stills beside {len(videos)} videos: stills teach looks, and no motion")
    if alike := selector.findings()["duplicates"]["clips"]:
        found.append(f"{alike} clips look like one of another file; shard: duplicates: drop leaves them out")
    bad, seen = sum(each.bad for each in selector.rejects), selector.stats.files.given
    if bad > (limit := ShardOptions.rejects_limit) * seen:
        found.append(
            f"{bad} of {seen} files cannot be used, more than rejects.limit={limit:g} allows: shard.py stops; remove "
            "them, or give shard: rejects.limit"
        )
    reasons = [f"{each.name}: {each.reason}" for each in selector.rejects if each.bad or each.part]
    found.extend(itertools.islice(reasons, 5))
    if len(reasons) > 5:
        found.append(f"{len(reasons) - 5} more files or clips that cannot be used; shard.py lists all in rejects.jsonl")
    return found


def _named(names: Sequence[str]) -> str:
    """Names as the subject of a message: the first, and how many there are."""
    return names[0] if len(names) == 1 else f"{len(names)} files (first: {names[0]})"
