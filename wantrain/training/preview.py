"""Previews: videos on fixed prompts and seeds while training goes on, through the real inference path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wantrain import world
from wantrain.geometry import Bucket
from wantrain.sampling import Sampler, Settings
from wantrain.training.metrics import Tracker
from wantrain.training.parallel import Stepper
from wantrain.video import contact_sheet, write_mp4


@dataclass
class Preview:
    """Hook: every `every` steps, step 0 included, one mp4 per prompt and a contact sheet; the tracker gets the mp4s.

    The main process samples and the others wait, so ranks stay together.
    """

    stepper: Stepper
    sampler: Sampler
    settings: Settings
    prompts: list[str]
    bucket: Bucket
    fps: float
    seed: int
    every: int
    steps: int
    folder: Path
    tracker: Tracker

    def __call__(self, step: int) -> Mapping[str, Any]:
        if step % self.every and step != self.steps:
            return {}
        if world.is_main():
            files, clips = {}, {}
            for number, prompt in enumerate(self.prompts):
                with torch.inference_mode(), self.stepper.forward_context():
                    frames = self.sampler(prompt, bucket=self.bucket, settings=self.settings, seed=self.seed + number)
                files[f"{number}"] = self.folder / f"step_{step:06d}_{number}.mp4"
                clips[f"step {step}: {prompt}"] = frames
                write_mp4(files[f"{number}"], frames, self.fps)
            contact_sheet(self.folder / f"step_{step:06d}.png", clips)
            self.tracker.videos(step, files, self.fps)
            world.say(f"step {step}: {len(files)} previews in {self.folder}")
        self.stepper.accelerator.wait_for_everyone()
        return {}
