"""Trackers: where scalars and previews go besides the run folder. None of them can stop or slow a run.

A tracker lives in a thread of its own behind a queue: one that is slow, down or refused costs the run nothing but what
it would have shown, and that is said once. metrics.jsonl has all of it in any case.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.seeds import seed_at

#: What tracker= takes.
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "jsonl")
#: Calls that may wait for a slow tracker; what comes on top is dropped.
WAITING = 1000
#: Seconds that the end of a run waits for its tracker, at most.
TIMEOUT = 60.0
#: Seconds that the exit of the program waits after that for an upload that still goes on.
LAST_WAIT = 600.0
#: Name of the process that W&B's library starts, which it joins at exit, however long that takes.
SERVICE = "wandb-core"


@dataclass(frozen=True)
class PreviewClip:
    """One video of a preview: the prompt's place in the list, and what was measured on it."""

    number: int
    prompt: str
    seed: int
    file: Path
    motion: float
    flicker: float


class Tracker(Protocol):
    """Where scalars and videos go besides the run folder."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step; steps come in order."""

    def previews(self, step: int, clips: Sequence[PreviewClip]) -> None:
        """Videos of one step, before its scalars."""

    def close(self, *, failed: bool = False) -> None:
        """Hand over what is still here; `failed` if an error ends the run."""


class NoTracker:
    """metrics.jsonl is enough."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def previews(self, step: int, clips: Sequence[PreviewClip]) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...


class WandbTracker:
    """Weights & Biases; offline into the run folder where there is no API key and no WANDB_MODE says otherwise.

    A preview's videos wait for the scalars of their step, which come later: W&B drops what is behind its last step.
    """

    def __init__(self, project: str, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # slow to import, and only this class needs it

        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # else tables wait for their upload elsewhere
        offline = "WANDB_MODE" not in os.environ and not _has_key()
        if offline:
            say(f"W&B: no API key, logging offline into {folder / 'wandb'} (wandb sync uploads it)")
        self.wandb = wandb
        mode: Any = "offline" if offline else os.environ.get("WANDB_MODE")  # as it is now: W&B reads it once
        self.run = wandb.init(
            project=project,
            name=run,
            id=f"{run}-{seed_at(str(folder.resolve())) % 16**8:08x}",
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode=mode,
        )
        self.waiting: dict[int, Sequence[PreviewClip]] = {}
        self.tables: dict[int, Any] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for earlier in sorted(waiting for waiting in self.waiting if waiting < step):
            self.run.log(self._media(earlier), step=earlier)
        self.run.log({**values, **self._media(step)}, step=step)

    def previews(self, step: int, clips: Sequence[PreviewClip]) -> None:
        self.waiting[step] = clips

    def close(self, *, failed: bool = False) -> None:
        for step in sorted(self.waiting):
            self.run.log(self._media(step), step=step)
        self.run.finish(exit_code=1 if failed else 0)

    def _media(self, step: int) -> dict[str, Any]:
        """The videos of a preview, and for each prompt a table whose rows are steps."""
        media: dict[str, Any] = {}
        for clip in self.waiting.pop(step, ()):
            # The file's path, not an array: W&B then copies our mp4 instead of encoding its own.
            video = self.wandb.Video(str(clip.file), caption=clip.prompt, format="mp4")
            media[f"samples/{clip.number}"] = video
            if clip.number not in self.tables:
                columns: list[str | int] = ["step", "video", "prompt", "seed", "motion", "flicker"]
                # Incremental: each log holds its new rows alone, not all videos so far once more.
                self.tables[clip.number] = self.wandb.Table(columns=columns, log_mode="INCREMENTAL")
            row = (step, video, clip.prompt, clip.seed, clip.motion, clip.flicker)
            self.tables[clip.number].add_data(*row)
            media[f"previews/{clip.number}"] = self.tables[clip.number]
        return media


def _has_key() -> bool:
    """Whether W&B has a key: in the environment, in its settings, or in ~/.netrc, where `wandb login` writes it."""
    import wandb

    return wandb.login(prompt=False, verify=False)


class TensorBoardTracker:
    """TensorBoard's event files in the run folder: `tensorboard --logdir runs`. Videos stay beside them as mp4."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this class needs it

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def previews(self, step: int, clips: Sequence[PreviewClip]) -> None:
        for clip in clips:
            self.writer.add_text(f"previews/{clip.number}", f"{clip.prompt} (seed {clip.seed}): {clip.file}", step)

    def close(self, *, failed: bool = False) -> None:
        self.writer.close()


class AccelerateTracker:
    """Trackio or MLflow, by accelerate's classes for them. Videos stay beside the run as mp4.

    Each start of a run is a run of its own in MLflow, which takes no second value of a setting.
    """

    def __init__(self, name: str, project: str, run: str, config: Mapping[str, Any]) -> None:
        from accelerate import tracking  # asks for the package of every tracker that it knows

        if name == "trackio":
            self.tracker = tracking.TrackioTracker(project, name=run, resume="allow")
        else:
            self.tracker = tracking.MLflowTracker(project, run_name=run)
        self.tracker.start()
        self.tracker.store_init_configuration(_flat(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def previews(self, step: int, clips: Sequence[PreviewClip]) -> None: ...

    def close(self, *, failed: bool = False) -> None:
        self.tracker.finish()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class AsyncTracker:
    """A tracker that `make` makes, worked by a thread that the run never waits for, but at its end."""

    def __init__(self, make: Callable[[], Tracker], *, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self.dropped = 0
        self.thread = threading.Thread(target=self._work, args=(make,), name="tracker", daemon=True)
        self.thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.scalars(step, values))

    def previews(self, step: int, clips: Sequence[PreviewClip]) -> None:
        self._put(lambda tracker: tracker.previews(step, clips))

    def close(self, *, failed: bool = False) -> None:
        """Wait until everything is logged, up to `timeout` seconds."""
        self._put(lambda tracker: tracker.close(failed=failed))
        self._put(None)
        self.thread.join(self.timeout)
        if self.thread.is_alive():
            say(
                f"warning: the tracker did not take everything within {self.timeout:g} s; metrics.jsonl has it all. "
                f"At its exit the program waits for it up to {LAST_WAIT:g} s more"
            )
            atexit.register(self._wait_at_exit)  # the last registered is the first called, so before W&B's own

    def _wait_at_exit(self) -> None:
        """Wait for what is still being logged; where that gets nowhere, end W&B's process: its library would wait for
        it without end.
        """
        self.thread.join(LAST_WAIT)
        if self.thread.is_alive():
            for process in children(SERVICE):
                os.kill(process, signal.SIGKILL)

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                say(
                    f"warning: the tracker is {WAITING} calls behind, so that some are left out; metrics.jsonl has them"
                )

    def _work(self, make: Callable[[], Tracker]) -> None:
        tracker: Tracker = NoTracker()
        try:
            tracker = make()
            while (call := self.calls.get()) is not None:
                call(tracker)
        except (Exception, SystemExit) as error:  # whatever a tracker and the network behind it come up with
            reason = " ".join(str(error).split())[:300]
            say(
                f"warning: the tracker failed ({type(error).__name__}: {reason}); the run goes on without it, and "
                "metrics.jsonl has everything"
            )
            while self.calls.get() is not None:  # the queue stays empty for whoever puts
                pass


def children(name: str) -> list[int]:
    """The child processes of this one that are called `name`; none where the system (no Linux) does not list them."""
    found = []
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread or child that has just ended
            for child in listed.read_text(encoding="ascii").split():
                if Path(f"/proc/{child}/comm").read_text(encoding="utf-8", errors="replace").strip() == name:
                    found.append(int(child))
    return found


def check_tracker(name: str) -> None:
    """ValueError for a tracker that there is not, whose package is missing, or that is to be online without a key."""
    if name not in TRACKERS:
        raise ValueError(f"tracker={name} is unknown; choose one of {', '.join(TRACKERS)}")
    if name != "jsonl" and importlib.util.find_spec(name) is None:
        extra = "wandb" if name == "wandb" else f'"wantrain[{name}]"'
        raise ValueError(f"tracker={name} needs its package: pip install {extra}; or give tracker=jsonl")
    if name == "wandb" and os.environ.get("WANDB_MODE") == "online" and not _has_key():
        raise ValueError(
            "WANDB_MODE=online, but W&B has no API key; run `wandb login`, set WANDB_API_KEY, or leave WANDB_MODE out, "
            "which logs offline"
        )


def build_tracker(name: str, *, project: str | None, run: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker called `name`, on the main process; others get none. ValueError as `check_tracker`."""
    check_tracker(name)
    if name == "jsonl" or not distributed.is_main():
        return NoTracker()
    project = project or "wantrain"
    if name == "wandb":
        return AsyncTracker(partial(WandbTracker, project, run, folder, config))
    if name == "tensorboard":
        return AsyncTracker(partial(TensorBoardTracker, folder))
    return AsyncTracker(partial(AccelerateTracker, name, project, run, config))
