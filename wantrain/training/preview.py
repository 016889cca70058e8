"""Previews: videos on fixed prompts and seeds while training goes on, through the real inference path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wantrain import world
from wantrain.geometry import Bucket
from wantrain.sampling import Sampler, Settings
from wantrain.training.metrics import Tracker
from wantrain.training.stepper import Stepper
from wantrain.video import Frames, contact_sheet, write_mp4


@dataclass
class Preview:
    """Hook: every `every` steps, step 0 included, one mp4 per prompt and a contact sheet; the tracker gets the mp4s.

    The main process samples and the others wait, so ranks stay together; where each holds only a part of the weights,
    all sample the same.
    """

    steppers: Sequence[Stepper]  # of the experts in training
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

    def due(self, step: int) -> bool:
        """True at every `every`-th step and the last one."""
        return step % self.every == 0 or step == self.steps

    def __call__(self, step: int) -> Mapping[str, Any]:
        if world.is_main() or any(stepper.sharded for stepper in self.steppers):
            clips = [self._sample(prompt, self.seed + number) for number, prompt in enumerate(self.prompts)]
            if world.is_main():
                self._write(step, clips)
        self.steppers[0].accelerator.wait_for_everyone()
        return {}

    def _sample(self, prompt: str, seed: int) -> Frames:
        with ExitStack() as contexts:
            for stepper in self.steppers:
                contexts.enter_context(stepper.forward_context())
            return self.sampler(prompt, bucket=self.bucket, settings=self.settings, seed=seed)

    def _write(self, step: int, clips: Sequence[Frames]) -> None:
        files = {}
        for number, frames in enumerate(clips):
            files[f"{number}"] = self.folder / f"step_{step:06d}_{number}.mp4"
            write_mp4(files[f"{number}"], frames, self.fps)
        titled = {f"step {step}: {prompt}": frames for prompt, frames in zip(self.prompts, clips, strict=True)}
        contact_sheet(self.folder / f"step_{step:06d}.png", titled)
        self.tracker.videos(step, files, self.fps)
        world.say(f"step {step}: {len(files)} previews in {self.folder}")
