"""Were the latents of a run made by the VAE and text encoder of its base? Answered without loading them where possible.

A manifest names the encoders by fingerprint (their values) and by identity (their files). The same files answer at
once. Other files may hold the same values, in another layout or dtype: then they are loaded and fingerprinted, once,
and noted beside the latents, or in the run's folder where nothing can be written there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wantrain.models import Base
from wantrain.models.formats import weights
from wantrain.models.formats.fingerprints import NOTES, Fingerprints, identity
from wantrain.training.engine.main_process import on_main
from wantrain.util.console import say


def check(data: Any, base: Base, dtype: torch.dtype, *, places: Sequence[str], otherwise: Path) -> None:
    """Raise ValueError unless the latents were made by the VAE and text encoder of the base (those that are here).

    The main process looks, and all learn what it found. `data` is what the run trains on (pixels have no encoders),
    `dtype` the text encoder's; `places` says where the data lie, and `otherwise` is the folder for notes where that of
    the data cannot be written.
    """
    if "vae_fingerprint" not in data.manifest:
        return
    comparison = EncoderCheck(data.manifest, ", ".join(places), base, dtype)
    notes = data.folder if os.access(data.folder, os.W_OK) else otherwise
    on_main(lambda: comparison.compare(notes), "comparing the latents' encoders")


@dataclass(frozen=True)
class EncoderCheck:
    """What a manifest tells of the encoders of `shards`, to be held against those of a base."""

    manifest: Mapping[str, Any]
    shards: str
    base: Base
    dtype: torch.dtype

    def compare(self, notes: Path) -> None:
        """Raise ValueError for an encoder of other values; what had to be loaded is noted in the folder `notes`."""
        absent = []
        for part in ("vae", "text_encoder"):
            ours = self._identity(part)
            if ours is None:
                absent.append(part)
            elif ours != self.manifest.get("encoders", {}).get(part):
                self._compare_values(part, ours, notes)
        if absent:
            say(
                f"{self.shards} was encoded by the right {' and '.join(absent)}, or so it is taken: {self.base} holds "
                "none here, and nothing is downloaded for a check alone"
            )

    def _identity(self, part: str) -> str | None:
        """Of the base's encoder; None where it is not on this machine."""
        if not self.base.holds(part):
            return None
        try:
            return identity(self.base, part, self.dtype)
        except ValueError:
            if self.base.repository is None or part in self.base.parts:
                raise
            return None  # a repository of which only what trains was fetched, and some of this part at another time

    def _compare_values(self, part: str, identity: str, notes: Path) -> None:
        """By fingerprint: as it was noted, or of the encoder itself."""
        prints, key = Fingerprints(notes), f"{part}_fingerprint"
        if (key, identity) not in prints:
            say(
                f"{self.base}: the {part} lies in other files than the one that made {self.shards}, or these were made "
                f"before that was noted; its values are compared, once ({notes / NOTES} remembers)"
            )
        ours = prints.of(key, identity, lambda: {key: weights.fingerprint(self._load(part))})[key]
        notes.mkdir(parents=True, exist_ok=True)
        prints.write()
        if ours != self.manifest[key]:
            raise ValueError(
                f"data.shards={self.shards} was encoded by another {part} (fingerprint {self.manifest[key]}, "
                f"{self.base} has {ours}); encode again with python encode.py and this run's weights= and parts.*=, or "
                "give those they were encoded with"
            )

    def _load(self, part: str) -> nn.Module:
        return self.base.vae(half="encoder") if part == "vae" else self.base.text_encoder(dtype=self.dtype)
