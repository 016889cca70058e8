"""LoRAs over experts: which files, in which order and how strong, from a config's `lora` group."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wantrain.models.formats.lora import LoRA, read_lora
from wantrain.models.formats.lora_expert import check_lora_expert
from wantrain.util.numbers import is_number

#: Keys of the group that name no expert.
_OTHERS = frozenset(("scale", "alpha"))
#: One entry of a list as typed: in quotes, or up to the next comma.
_ENTRY = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*?))\s*(?:,|$)""")
_SHAPE = "a number, or one per expert: lora.scale={high_noise: 0.8, low_noise: [1, 0.5]}, a list where it has several"


@dataclass(frozen=True)
class Lora:
    """One LoRA to merge into an expert.

    path      its file
    strength  what its change is multiplied by: any finite number
    alpha     for a file that does not hold its own
    run       the run that trained it; None for a file that was given
    """

    path: Path
    strength: float = 1.0
    alpha: float | None = None
    run: str | None = None

    @property
    def label(self) -> str:
        """What people call it: the run, or the file's name."""
        return self.path.name if self.run is None else f"run {self.run}"

    def read(self, expert: str) -> LoRA:
        """Its layers. ValueError for a damaged file, one of another expert, and a DoRA at another strength than 1."""
        lora = read_lora(self.path, alpha=self.alpha, expert=expert)
        check_lora_expert(self.path, lora.metadata, expert)
        if lora.is_dora and self.strength != 1:
            raise ValueError(
                f"lora.scale={self.strength:g}: {self.path} is a DoRA, which has no strength that tools agree on (its "
                "magnitudes replace those of the weights); leave it at 1"
            )
        return lora

    def record(self) -> dict[str, object]:
        """What a sample's JSON says about it."""
        facts = {"run": self.run, "file": self.path.name, "strength": self.strength, "alpha": self.alpha}
        return {key: value for key, value in facts.items() if value is not None}


@dataclass(frozen=True)
class LoraSettings:
    """The `lora` group of a config.

    files  LoRA files by expert, in the order in which they are merged
    scale  strength of all LoRAs, a run's own among them; or by expert, one for all of its LoRAs or a list with one for
           each, the run's own first
    alpha  for files that do not hold theirs
    """

    files: Mapping[str, tuple[Path, ...]]
    scale: Any = 1.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        values = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        single = [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]
        listed = isinstance(self.scale, list | tuple)
        if listed or not all(is_number(value) and math.isfinite(value) for value in single):
            raise ValueError(f"lora.scale={self.scale} must be {_SHAPE}")
        if self.alpha is not None and not (is_number(self.alpha) and math.isfinite(self.alpha)):
            raise ValueError(f"lora.alpha={self.alpha} must be a number")
        for name, files in self.files.items():
            if twice := next((file for file in files if files.count(file) > 1), None):
                raise ValueError(f"lora.{name} names {twice} twice; name it once, and give its strength in lora.scale")

    @classmethod
    def of(cls, settings: Mapping[str, Any], locate: Callable[[str | Path], Path]) -> LoraSettings:
        """From a config's group: for each expert null, a file, or a list of files; scale and alpha."""
        given = {name: value for name, value in settings.items() if name not in _OTHERS and value is not None}
        files = {name: tuple(map(locate, listed(value))) for name, value in given.items()}
        return cls({name: some for name, some in files.items() if some}, settings["scale"], settings["alpha"])

    def over(self, own: Mapping[str, Lora], names: Sequence[str]) -> dict[str, tuple[Lora, ...]]:
        """The LoRAs of each of the experts `names`, those that runs trained (`own`) first.

        ValueError for an expert that is not among `names`, or a list of strengths of another length.
        """
        scaled = self.scale if isinstance(self.scale, Mapping) else {}
        for key, value in {**{f"scale.{name}": value for name, value in scaled.items()}, **self.files}.items():
            if key.removeprefix("scale.") not in names:
                value = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(
                    f"lora.{key}={value}: this model has {', '.join(names)}, no {key.removeprefix('scale.')}"
                )
        return {name: self._of_expert(name, own.get(name)) for name in names}

    def _of_expert(self, name: str, own: Lora | None) -> tuple[Lora, ...]:
        loras = [*([] if own is None else [own]), *(Lora(file, alpha=self.alpha) for file in self.files.get(name, ()))]
        scale = self.scale.get(name, 1.0) if isinstance(self.scale, Mapping) else self.scale
        strengths = list(scale) if isinstance(scale, list | tuple) else [scale] * len(loras)
        if loras and len(strengths) != len(loras):
            raise ValueError(
                f"lora.scale: {name} has {len(loras)} LoRAs ({', '.join(lora.label for lora in loras)}) and "
                f"{len(strengths)} strengths ({', '.join(map(str, strengths))}); give one for each, in this order"
            )
        return tuple(replace(lora, strength=float(value)) for lora, value in zip(loras, strengths, strict=False))

    def check_used(self, found: Iterable[Mapping[str, Sequence[Lora]]]) -> None:
        """Raise ValueError for a scale or an alpha that none of the LoRAs in `found` (by expert) takes."""
        have = {name for loras in found for name, some in loras.items() if some}
        if isinstance(self.scale, Mapping):
            for name in self.scale.keys() - have:
                raise ValueError(f"lora.scale: {name} has no LoRA here; leave it out, or give lora.{name}=FILE")
        elif self.scale != 1 and not have:
            raise ValueError(
                f"lora.scale={self.scale} changes nothing: no LoRA is given, and the experts are whole weights; leave "
                "it out, or give lora.EXPERT=FILE"
            )
        if self.alpha is not None and not self.files:
            raise ValueError(
                f"lora.alpha={self.alpha} is for files that do not hold theirs, and none is given; leave it out"
            )


def listed(value: Any) -> list[str]:
    """The paths that a setting names: one, or a list `[A, B]`.

    A file whose name has brackets is taken as it is. An entry of a list may be in quotes, and must be if it has commas.
    """
    if isinstance(value, list | tuple):
        return [str(each) for each in value]
    text = str(value)
    if not (text.startswith("[") and text.endswith("]")) or Path(text).exists():
        return [text]
    entries, place, inside = [], 0, text[1:-1]
    while place < len(inside):
        match = _ENTRY.match(inside, place)
        if match is None or match.end() == place:
            raise ValueError(f"{value} is no list of files: write [FILE, FILE], names with commas in quotes")
        entries.append(next((group for group in match.groups() if group is not None), ""))
        place = match.end()
    if not entries or "" in entries:
        raise ValueError(f"{value} is no list of files: it has an empty entry")
    return [os.path.expanduser(entry) for entry in entries]  # noqa: PTH111 - as for a single path
