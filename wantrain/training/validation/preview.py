"""Previews: videos on fixed prompts and seeds while training goes on, through the real inference path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wantrain.conditioning import ModelInputs
from wantrain.demo.judge import shows
from wantrain.geometry import Bucket
from wantrain.runs.pages.content import PREVIEWS
from wantrain.runs.pages.live import INDEX
from wantrain.sampling import Sampler, Settings
from wantrain.training.engine.engine import Stepper
from wantrain.training.engine.main_process import on_main
from wantrain.training.monitoring.trackers import PreviewClip, Tracker
from wantrain.training.protocols import due
from wantrain.util.console import say
from wantrain.util.files import write_atomically
from wantrain.video import Frames, contact_sheet, flicker, motion, write_mp4


@dataclass(frozen=True)
class PreviewRequest:
    """A video to preview: its prompt, its size, and its conditioning (of one clip), if the model takes any."""

    prompt: str
    bucket: Bucket
    inputs: ModelInputs | None = None


@dataclass
class Preview:
    """Hook: every `every` steps, step 0 included, one mp4 of each request and a contact sheet; the run's page
    (runs/pages) shows them, and the tracker gets the mp4s.

    The main process samples and the others wait, so ranks stay together; where each holds only a part of the weights,
    or computes only a part of the tokens, all sample the same. `open_sampler` makes what a preview needs and takes it
    away again: between previews nothing of it but the texts' embeddings is in memory.
    """

    kind: ClassVar[str] = "preview"
    steppers: Sequence[Stepper]  # of the experts in training
    open_sampler: Callable[[], AbstractContextManager[Sampler]]
    settings: Settings
    requests: Sequence[PreviewRequest]
    fps: float
    seed: int
    every: int
    steps: int
    folder: Path
    tracker: Tracker
    texts: dict[str, Tensor]  # embeddings of all requests, by text, on the processes that sample

    def due(self, step: int) -> bool:
        """True at the steps of `every` and at the last one."""
        return due(step, every=self.every, last=self.steps)

    def __call__(self, step: int) -> Mapping[str, Any]:
        clips = self._sample() if any(stepper.forwards_together for stepper in self.steppers) else None

        def show() -> dict[str, float]:
            return self._show(step, self._sample() if clips is None else clips)

        return on_main(show, f"making the previews of step {step}")

    def _show(self, step: int, clips: Sequence[Frames]) -> dict[str, float]:
        """Write the clips, give them to the tracker, and say how much they move and flicker, on average. Where the
        judge of the demo's footage can read a prompt, also how many of these clips show what it says.
        """
        previews = self._write(step, clips)
        self.tracker.previews(step, previews)
        read = [shows(request.prompt, frames) for request, frames in zip(self.requests, clips, strict=True)]
        right = [each for each in read if each is not None]
        return {
            f"preview_{what}": sum(getattr(preview, what) for preview in previews) / len(previews)
            for what in ("motion", "flicker")
        } | ({"preview_right": sum(right) / len(right)} if right else {})

    def _sample(self) -> list[Frames]:
        """A video for each prompt."""
        with self.open_sampler() as sampler:
            sampler.texts = self.texts
            clips = [
                sampler(each.prompt, bucket=each.bucket, inputs=each.inputs, settings=self.settings, seed=seed)
                for seed, each in enumerate(self.requests, start=self.seed)
            ]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks of the preview's sizes are of no use to training
        return clips

    def _write(self, step: int, clips: Sequence[Frames]) -> list[PreviewClip]:
        """Everything that a preview leaves in the run folder."""
        previews = []
        prompts = [request.prompt for request in self.requests]
        for number, (prompt, frames) in enumerate(zip(prompts, clips, strict=True)):
            file = self.folder / f"step_{step:06d}_{number}.mp4"
            write_mp4(file, frames, self.fps)
            previews.append(
                PreviewClip(
                    number, prompt, self.seed + number, file, round(motion(frames), 4), round(flicker(frames), 4)
                )
            )
        titled = {f"step {step}: {prompt}": frames for prompt, frames in zip(prompts, clips, strict=True)}
        contact_sheet(self.folder / f"step_{step:06d}.png", titled)
        write_history(self.folder / PREVIEWS, step, previews)
        say(f"step {step}: {len(previews)} previews, shown by {self.folder.parent / INDEX}")
        return previews


@dataclass(frozen=True)
class AsTrained:
    """The expert in training as a velocity model: it computes as its run does, and nothing beside it, so that solver
    and VAE are those of sample.py.
    """

    stepper: Stepper

    @property
    def network(self) -> nn.Module:
        """What computes."""
        return self.stepper.module

    def __call__(self, *inputs: Any, **conditioning: Tensor) -> Tensor:
        with self.stepper.forward_context():
            answer: Tensor = self.network(*inputs, **conditioning)
        return answer


def write_history(path: Path, step: int, previews: Sequence[PreviewClip]) -> None:
    """Record all previews up to `step`; later ones, of a run that has resumed from a checkpoint before, are dropped."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
    kept = [row for row in rows if row["step"] < step]
    kept += [{"step": step, **asdict(replace(each, file=Path(each.file.name)))} for each in previews]
    lines = [json.dumps({**row, "file": str(row["file"])}, ensure_ascii=False) for row in kept]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
