"""Windows: which clips of a file are taken, at which rate, and that only what is asked for stretches or skips time."""

import itertools

import numpy as np
import pytest

from wantrain.data.footage.clips import ClipOptions, VideoInfo, Window, cut_windows, frames_on_screen, spans


def probed(times, end):
    return VideoInfo(64, 64, np.asarray(times, dtype=np.float64), end)


def regular(count, rate, start=0.0):
    return probed(start + np.arange(count) / rate, start + count / rate)


def shown(found, window, fps=16):
    return frames_on_screen(found, window, fps).tolist()


def test_native_windows():
    """Windows at the native rate show every frame once, whatever the rate, also where frames come irregularly."""
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 53)) + 3.5
    found = probed(times, times[-1] + 0.1)
    windows = cut_windows(found, ClipOptions(17, None))
    assert [shown(found, window) for window in windows] == [list(range(i * 17, i * 17 + 17)) for i in range(3)]
    assert all(window.native for window in windows)
    (short,) = cut_windows(probed(times[:16], 9), ClipOptions(17, None))
    assert shown(probed(times[:16], 9), short) == list(range(13))
    with pytest.raises(ValueError, match="less than 5 frames at its own rate"):
        cut_windows(probed(times[:4], 9), ClipOptions(17, None))


@pytest.mark.parametrize("stride", [2, 3])
def test_window_stride(stride):
    """A stride of n takes every nth frame and leaves the others out."""
    found = regular(100, 16)
    for fps in (16, None):
        windows = cut_windows(found, ClipOptions(9, fps, stride=stride))
        numbers = [number for window in windows for number in shown(found, window)]
        assert numbers == list(range(0, len(numbers) * stride, stride))
        # All that fits is there: the frames that are left are too few for one more clip.
        assert 100 - len(numbers) * stride < 9 * stride
    with pytest.raises(ValueError, match="less than 5 frames at 16 fps, every 30th taken"):
        cut_windows(found, ClipOptions(9, 16, stride=30))


@pytest.mark.parametrize("fps", [16, None])
def test_window_stretch(fps):
    """The time of a short file is stretched to the full length only with stretch=True."""
    found = regular(10, 16)
    (short,) = cut_windows(found, ClipOptions(17, fps))
    assert (short.num_frames, short.stride) == (9, 1)
    (stretched,) = cut_windows(found, ClipOptions(17, fps, stretch=True))
    assert stretched.num_frames == 17
    numbers = shown(found, stretched)
    assert numbers == [int(k * 10 / 17 + 1e-6) for k in range(17)]
    assert spans(found, [stretched], fps or 16) == pytest.approx([10 / 16])
    # A file that is long enough is as it was.
    assert cut_windows(regular(40, 16), ClipOptions(17, fps, stretch=True)) == cut_windows(
        regular(40, 16), ClipOptions(17, fps)
    )


def test_random_clips():
    """The start of a random clip depends on the seed and the file's name, and every start that fits is drawn."""
    found = regular(64, 16)
    starts = [
        cut_windows(found, ClipOptions(17, 16, "random", seed=seed), name=f"{n}")[0].start
        for seed in (0, 1)
        for n in range(200)
    ]
    again = [
        cut_windows(found, ClipOptions(17, 16, "random", seed=seed), name=f"{n}")[0].start
        for seed in (0, 1)
        for n in range(200)
    ]
    assert starts == again
    assert starts[:200] != starts[200:]
    assert set(starts) == {k / 16 for k in range(48)}  # every place where a clip fits, and no other
    assert np.mean(starts) == pytest.approx(47 / 2 / 16, abs=0.2)


def test_clip_lengths():
    """A clip has one of the allowed lengths, and a file shorter than all of them is refused."""

    def lengths(count, **choices):
        return [
            window.num_frames
            for window in cut_windows(regular(count, 16), ClipOptions(81, 16, lengths=(17, 49), **choices))
        ]

    assert lengths(48) == [17, 17]
    assert lengths(49) == [49]
    assert lengths(200) == [49] * 4
    with pytest.raises(ValueError, match=r"it lasts 1\.00 s, less than 17 frames at 16 fps"):
        lengths(16)
    with pytest.raises(ValueError, match="is one frame, and lengths"):
        cut_windows(regular(1, 16), ClipOptions(17, 16, lengths=(17,)))


@pytest.mark.parametrize("fps", [16, 24, None])
@pytest.mark.parametrize("clips", ["all", "first", "middle", "random"])
def test_clips_within_scenes(fps, clips):
    """No clip crosses a cut between two scenes."""
    found = regular(120, 24, start=1.0)
    cuts = [1 + 41 / 24, 1 + 44 / 24, 1 + 90 / 24]  # scenes of 41, 3, 46 and 30 frames
    windows = cut_windows(found, ClipOptions(9, fps, clips), scenes=cuts)
    scene = np.searchsorted([41, 44, 90], np.arange(120), side="right")
    per_scene = [set(scene[shown(found, window, fps or 24)].tolist()) for window in windows]
    assert all(len(scenes) == 1 for scenes in per_scene)
    taken = [scenes.pop() for scenes in per_scene]
    assert set(taken) == {0, 2, 3}  # the scene of three frames holds no clip
    assert clips == "all" or taken == [0, 2, 3]
    assert windows == sorted(windows, key=lambda window: window.start)
    with pytest.raises(ValueError, match="each of its scenes less than 5 frames"):
        cut_windows(regular(12, 24), ClipOptions(9, fps), scenes=[4 / 24, 8 / 24])


@pytest.mark.parametrize("fps", [8, 16, 24, None])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("rate", "count"), [(24, 24), (30, 77), (23.976, 171), (16, 17), (10, 300)])
def test_clip_seconds(rate, count, stride, fps):
    """The seconds that clips cover are counted once."""
    found = regular(count, rate, 0.5)
    try:
        windows = cut_windows(found, ClipOptions(17, fps, stride=stride))
    except ValueError:
        return
    covered = spans(found, windows, fps or found.rate)
    for before, after, seconds in zip(windows, windows[1:], covered, strict=False):
        assert before.start + seconds == pytest.approx(after.start)
    assert windows[-1].start + covered[-1] <= found.end + 1e-9
    assert found.seconds - sum(covered) < 17 * stride / min(fps or rate, rate)
    for one, other in itertools.pairwise(windows):
        assert set(shown(found, one, fps)) & set(shown(found, other, fps)) == set() or (fps or 0) > rate


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"num_frames": 16}, "num_frames=16 is not 4k"),
        ({"lengths": (5, 8)}, "lengths=8 is not 4k"),
        ({"lengths": (33,)}, "all are longer than num_frames=17"),
        ({"clips": "last"}, "clips=last is unknown; choose one of all, first, middle, random"),
        ({"stride": 0}, "stride=0 must be 1 or more"),
    ],
)
def test_invalid_options(choice, problem):
    """An invalid option raises an error that names it."""
    with pytest.raises(ValueError, match=problem):
        ClipOptions(**{"num_frames": 17, "fps": 16, **choice})


def test_window_round_trip():
    """A window equals the one that is built again from its fields, as from JSON."""
    window = Window(1 / 3, 17, 10 / 17, True)
    assert Window(**vars(window)) == window
