"""What a run says: metrics.jsonl always (one object per optimizer step), one console line, W&B if wanted.

Values may live on the device until the line is flushed, so that a GPU is not stopped at every step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from wantrain import world


@dataclass(frozen=True)
class Look:
    """One video of a preview: the prompt's place in the list, and what was measured on it."""

    number: int
    prompt: str
    seed: int
    file: Path
    motion: float
    flicker: float


class Tracker(Protocol):
    """Where scalars and videos go besides the run folder."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def previews(self, step: int, looks: Sequence[Look]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """metrics.jsonl is enough."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def previews(self, step: int, looks: Sequence[Look]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; offline into the run folder where there is no API key and no WANDB_MODE says otherwise.

    A preview's videos wait for the scalars of their step, which come later: W&B drops what is behind its last step.
    """

    def __init__(self, project: str, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # slow to import, and only this class needs it

        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # else tables wait for their upload elsewhere
        offline = "WANDB_MODE" not in os.environ and not wandb.setup().settings.api_key
        if offline:
            world.say(f"W&B: no API key, logging offline into {folder / 'wandb'} (wandb sync uploads it)")
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            name=run,
            id=f"{run}-{world.seed_at(str(folder.resolve())) % 16**8:08x}",
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode="offline" if offline else None,
        )
        self.waiting: dict[int, Sequence[Look]] = {}
        self.tables: dict[int, Any] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for earlier in sorted(waiting for waiting in self.waiting if waiting < step):
            self.run.log(self._media(earlier), step=earlier)
        self.run.log({**values, **self._media(step)}, step=step)

    def previews(self, step: int, looks: Sequence[Look]) -> None:
        self.waiting[step] = looks

    def close(self) -> None:
        for step in sorted(self.waiting):
            self.run.log(self._media(step), step=step)
        self.run.finish()

    def _media(self, step: int) -> dict[str, Any]:
        """The videos of a preview, and for each prompt a table whose rows are steps."""
        media: dict[str, Any] = {}
        for look in self.waiting.pop(step, ()):
            # The file's path, not an array: W&B then copies our mp4 instead of encoding its own.
            video = self.wandb.Video(str(look.file), caption=look.prompt, format="mp4")
            media[f"samples/{look.number}"] = video
            if look.number not in self.tables:
                columns: list[str | int] = ["step", "video", "prompt", "seed", "motion", "flicker"]
                # Incremental: each log holds its new rows alone, not all videos so far once more.
                self.tables[look.number] = self.wandb.Table(columns=columns, log_mode="INCREMENTAL")
            row = (step, video, look.prompt, look.seed, look.motion, look.flicker)
            self.tables[look.number].add_data(*row)
            media[f"previews/{look.number}"] = self.tables[look.number]
        return media


def build_tracker(name: str, *, project: str | None, run: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker called `name`, on the main process; others get none."""
    if name not in {"wandb", "jsonl"}:
        raise ValueError(f"tracker={name!r} is unknown; choose wandb or jsonl")
    if name == "wandb" and world.is_main():
        return WandbTracker(project or "wantrain", run, folder, config)
    return NoTracker()


class Metrics:
    """One object per optimizer step into `path`, with what happened at it: loss, rates, validation."""

    def __init__(self, path: Path, *, steps: int) -> None:
        self.path, self.steps = path, steps
        self.tracker: Tracker = NoTracker()
        self.pending: list[dict[str, Any]] = []
        self.lap = time.perf_counter()

    def cut_back(self, step: int) -> None:
        """Drop what was logged after the checkpoint that the run continues from (main process only)."""
        if not world.is_main() or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        world.write_atomically(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, values: Mapping[str, Tensor | float | int | str]) -> None:
        """Remember one step's values; tensors stay where they are until `flush`."""
        now = time.perf_counter()
        self.pending.append({"step": step, **values, "seconds": now - self.lap})
        self.lap = now

    def annotate(self, step: int, values: Mapping[str, Any]) -> None:
        """Add to the object of `step` (made if there is none): results that came after its update."""
        if values:
            if not self.pending or self.pending[-1]["step"] != step:
                self.pending.append({"step": step})
            self.pending[-1].update(values)
        self.lap = time.perf_counter()  # the next step does not pay for validation and previews

    def flush(self, *, speak: bool = True) -> None:
        """Write what is pending, sync it, and say one line."""
        if not self.pending:
            return
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.pending]
        self.pending = []
        if not world.is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            # A pair's two experts are two curves each.
            prefix = f"{row['expert']}/" if "expert" in row else ""
            scalars = {
                key if "/" in key else f"{prefix}{key}": value
                for key, value in row.items()
                if isinstance(value, float | int) and key != "step"
            }
            self.tracker.scalars(row["step"], scalars)
        losses = [row for row in rows if row.get("loss") is not None]
        if speak and losses:
            self._speak(losses)

    def _speak(self, rows: list[dict[str, Any]]) -> None:
        step = rows[-1]["step"]
        loss = sum(row["loss"] for row in rows) / len(rows)
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        left = (self.steps - step) * seconds
        samples = rows[-1]["samples"] / step / seconds
        world.say(
            f"step {step}/{self.steps}  loss {loss:.4f}  {seconds:.2f} s/step  {samples:.1f} samples/s  "
            f"{int(left) // 60}m{int(left) % 60:02d}s left"
        )


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is no number is null."""
    number = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _step_of(line: str) -> float:
    """The step of one logged line; a line cut by a kill counts as later than any checkpoint."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
