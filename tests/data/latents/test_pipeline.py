"""Batches through a pipeline: what happens at the same time, in which order, how many there are, and how it ends.

Stages wait for each other's events; where two do not overlap an event never comes, and the wait is a failure.
"""

import threading
import time

import pytest

from wantrain.data.latents.pipeline import Abandoned, Pipeline

COUNT = 6
#: Seconds after which what should happen at the same time counts as not doing so.
LONG = 20.0


def threads():
    return {thread.name for thread in threading.enumerate()} & {"prefetch", "storing"}


class Stages:
    """Four stages that pass numbers on and remember what each did, in the order of time; each can be made to wait."""

    def __init__(self, count=COUNT):
        self.count, self.did, self.waits = count, [], {}
        self.changed = threading.Condition()

    def note(self, stage, number):
        with self.changed:
            self.did.append((stage, number))
            self.changed.notify_all()
            wanted = self.waits.get((stage, number))
            assert wanted is None or self.changed.wait_for(lambda: wanted in self.did, LONG), (
                f"{wanted} does not come while {stage} is at {number}: {self.did}"
            )

    def requests(self):
        for number in range(self.count):
            yield lambda number=number: self.stage("read", number)

    def stage(self, name, number):
        self.note(name, number)
        return number

    def store(self, results):
        for number in results:
            self.note("store", number)
            self.note("stored", number)

    def pipeline(self, **changes):
        given = {
            "upload": lambda number: self.stage("upload", number),
            "work": lambda number: self.stage("work", number),
            "store": self.store,
            "close_source": lambda: None,
        }
        return Pipeline(changes.pop("source", self.requests()), **{**given, **changes})

    def of(self, stage):
        return [number for name, number in self.did if name == stage]


def test_stage_order():
    """Every batch goes through every stage in order."""
    stages = Stages()
    with stages.pipeline() as pipeline:
        pipeline.run()
    for stage in ("read", "upload", "work", "store", "stored"):
        assert stages.of(stage) == list(range(COUNT))
    assert not threads()


def test_stage_overlap():
    """The stages read, work and store run at the same time.

    Batch n is worked on only when n + 1 has been uploaded, ends only when n + 2 has been read, and is stored only when
    n + 1 is being worked on: a slow reader, worker or writer holds up no other batch.
    """
    stages = Stages()
    for number in range(COUNT - 2):
        stages.waits["work", number] = ("read", number + 2)
        stages.waits["store", number] = ("work", number + 1)
    with stages.pipeline() as pipeline:
        pipeline.run()
    for number in range(COUNT - 1):
        assert stages.did.index(("upload", number + 1)) < stages.did.index(("work", number))
    assert stages.of("stored") == list(range(COUNT))


def test_early_read():
    """The pipeline reads before run() is called: clips are decoded while encode.py encodes captions."""
    stages = Stages()
    with stages.pipeline() as pipeline:
        with stages.changed:
            assert stages.changed.wait_for(lambda: ("read", 1) in stages.did, LONG)
        assert stages.of("upload") == []
        pipeline.run()
    assert stages.of("stored") == list(range(COUNT))


def test_slow_store():
    """A slow store stage holds up the others, so that at most six batches exist."""
    stages, release = Stages(40), threading.Event()

    def store(results):
        for number in results:
            assert release.wait(LONG)
            stages.note("stored", number)

    def look():
        time.sleep(0.5)  # time enough to run ahead, if anything did
        seen.extend(stages.did)
        release.set()

    seen, watcher = [], threading.Thread(target=look)
    watcher.start()
    with stages.pipeline(store=store) as pipeline:
        pipeline.run()
    watcher.join()
    assert max(number for stage, number in seen if stage == "read") < 6
    assert max(number for stage, number in seen if stage == "work") < 3
    assert stages.of("stored") == list(range(40))


@pytest.mark.parametrize("failing", ["read", "upload", "work", "store"])
def test_stage_errors(failing):
    """An error of any stage is raised in the caller's thread and leaves no thread."""

    class Failing(Stages):
        def note(self, stage, number):
            if (stage, number) == (failing, 3):
                raise ValueError(f"{failing} cannot")
            super().note(stage, number)

    stages = Failing(1000)
    with pytest.raises(ValueError, match=f"{failing} cannot"), stages.pipeline() as pipeline:
        pipeline.run()
    assert not threads()
    assert stages.of("stored") == list(range(len(stages.of("stored")))) and len(stages.of("stored")) <= 3
    if failing == "work":
        assert stages.of("stored") == [0, 1, 2], "what was made before is stored"


def test_abandoned_store():
    """The store stage gets Abandoned when the pipeline ends early, so that it finishes no partial file."""
    seen, stages = [], Stages()

    def store(results):
        try:
            seen.extend(results)
            seen.append("whole")
        except Abandoned:
            seen.append("abandoned")
            raise

    def work(number):
        if number == 2:
            raise ValueError("no")
        return number

    with pytest.raises(ValueError, match=r"^no$"), stages.pipeline(store=store, work=work) as pipeline:
        pipeline.run()
    with stages.pipeline(source=Stages(2).requests(), store=store) as pipeline:
        pipeline.run()
    assert [each for each in seen if isinstance(each, str)] == ["abandoned", "whole"]


def test_blocked_source():
    """A source that blocks is closed, and an error of the encoder does not wait for it.

    A decoder may take minutes for its next clip.
    """
    closed, seen, stages = threading.Event(), [], Stages()

    def source():
        yield lambda: 0
        yield lambda: 1
        seen.append(closed.wait(LONG))

    def work(_):
        raise ValueError("out of memory")

    with (
        pytest.raises(ValueError, match="out of memory"),
        stages.pipeline(source=source(), work=work, close_source=closed.set) as pipeline,
    ):
        pipeline.run()
    assert seen == [True] and not threads()


def test_unstored_results():
    """A store stage that does not take all results is an error."""
    stages = Stages()
    with (
        pytest.raises(AssertionError, match="store takes all results"),
        stages.pipeline(store=lambda results: next(results)) as pipeline,
    ):
        pipeline.run()
