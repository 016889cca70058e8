"""Scene detection by PySceneDetect (the extra `scenes`), on the displayed frames.

PySceneDetect receives our frames one by one instead of the file. Given the file it would read through OpenCV, which
counts the frames before an edit list and uses its own timestamps.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wantrain.video import Frames

#: Frames are reduced to about this width for the detector.
WIDTH = 256


def library() -> ModuleType:
    """Import PySceneDetect; ValueError names the extra if it is not installed."""
    try:
        import scenedetect  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"scenes=split needs PySceneDetect, which is not installed ({error}); pip install 'wantrain[scenes]', "
            "or give scenes=off"
        ) from error
    return scenedetect


class SceneDetector:
    """Detects scene changes in the frames of one file, given in order."""

    def __init__(self) -> None:
        self._library = library()
        self._detector = self._library.AdaptiveDetector()
        self._cuts: set[int] = set()
        self._count = 0

    def watch(self, frame: Frames) -> None:
        """Process the next frame (H, W, 3), RGB."""
        step = max(1, frame.shape[1] // WIDTH)
        small = np.ascontiguousarray(frame[::step, ::step, ::-1])  # the detector takes BGR
        self._note(self._detector.process_frame(self._place(self._count), small))
        self._count += 1

    def begins(self, times: NDArray[np.float64]) -> list[float]:
        """When each scene but the first begins, in seconds; `times` are those of the processed frames."""
        self._note(self._detector.post_process(self._place(max(0, self._count - 1))))
        return [float(times[number]) for number in sorted(self._cuts) if 0 < number < len(times)]

    def _note(self, cuts: list[Any]) -> None:
        self._cuts.update(int(cut.frame_num) for cut in cuts)

    def _place(self, number: int) -> Any:
        # Only the frame number matters; the rate has no effect on the result.
        return self._library.FrameTimecode(number, 30.0)
