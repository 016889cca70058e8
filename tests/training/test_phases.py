"""A run in phases (recipe=wan_tiny_scratch in small): what each draws and logs, an exact resume at a border, the plan."""

import json
import re

import pytest
from engine_runs import measured

from wantrain import checks, config
from wantrain.demo.footage import make_footage
from wantrain.settings.heard import unheard

STEPS = 9
SCHEDULE = (
    "[{from: 0, sets: {images: 1}, batch_size: 8}, {from: 3, sets: {images: 1, video32: 2}, batch_size: 4}, "
    "{from: 6, sets: {video64: 1}}]"
)


@pytest.fixture(scope="module")
def sizes(tiny, inside, tmp_path_factory):
    """The recipe's three sets: stills, and the same clips at two sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    make_footage(folder / "clips", num_videos=5, num_images=0, size=64)
    make_footage(folder / "stills", num_videos=0, num_images=6, size=32)
    inside(folder, "shard.py", "source=clips", "out=videos", "num_frames=9", "report=none")
    inside(folder, "shard.py", "source=stills", "out=still_shards", "num_frames=1", "report=none")
    for shards, out, area in (
        ("still_shards", "images", 1024),
        ("videos", "video32", 1024),
        ("videos", "video64", 4096),
    ):
        how = (f"area={area}", f"weights={tiny.base}", "report=none")
        inside(folder, "encode.py", f"shards={shards}", f"out={out}", *how)
    return folder


def command(tiny, sizes, *more, schedule=SCHEDULE):
    own = [each for each in tiny.train if not each.startswith("data.shards=")]
    sets = [f"data.sets.{name}.shards={sizes / name}" for name in ("images", "video32", "video64")]
    return ["recipe=wan_tiny_scratch", *own, *sets, f"data.schedule={schedule}", "batch_size=2", f"steps={STEPS}",
            "run=r", "optimizer=adamw", "data.holdout=0.2", "validation.every=3", *more]  # fmt: skip


def rows(folder, run="r"):
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def unbroken(tiny, sizes, inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    ended = inside(folder, "train.py", *command(tiny, sizes))
    return folder, ended.stdout


def test_phases(unbroken):
    """Each phase draws its own sets and sizes in steps of its own batch size, and the log says which it is."""
    folder, said = unbroken
    log = rows(folder)
    assert [row["phase"] for row in log] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [len(row["clips"]) for row in log] == [8] * 3 + [4] * 3 + [2] * 3
    assert [row["samples"] for row in log] == [8, 16, 24, 28, 32, 36, 38, 40, 42]
    owners = [{clip[0].split("/")[0] for clip in row["clips"]} for row in log]
    assert owners[:3] == [{"images"}] * 3 and owners[6:] == [{"video64"}] * 3
    assert set.union(*owners[3:6]) == {"images", "video32"}
    assert [row["tokens"] / len(row["clips"]) for row in log[:3] + log[6:]] == [4.0] * 3 + [48.0] * 3
    for number, (step, mix) in enumerate(((0, "100% images"), (3, "33% images, 67% video32"), (6, "100% video64"))):
        assert f"data.schedule: step {step} begins phase {number}, {mix}; {8 >> number} samples in each step" in said
    assert {"images", "video32", "video64"} <= log[-1]["validation_by_tag"].keys()


def test_resume_at_a_border(unbroken, tiny, sizes, call, tmp_path):
    """Stopped at a border and continued, with a later entry that has changed meanwhile and was put back, the run is the
    unbroken one; an entry that was trained by may not change.
    """
    other = SCHEDULE.replace("{from: 6, sets: {video64: 1}}", "{from: 7, sets: {images: 1, video64: 1}}")
    call("train.py", *command(tiny, sizes, "stop_after=3", schedule=other))
    call("train.py", *command(tiny, sizes, "stop_after=6"))
    past = SCHEDULE.replace("video32: 2", "video32: 3")
    refused = call("train.py", *command(tiny, sizes, schedule=past), check=False).error
    assert re.search(
        r"data\.schedule\[1\] has changed: .* video32: 2.* -> .* video32: 3.*, and 6 steps are made", refused
    )
    call("train.py", *command(tiny, sizes))
    whole, parts = (
        [(row["loss"], row["clips"], row["phase"]) for row in rows(folder)] for folder in (unbroken[0], tmp_path)
    )
    assert parts == whole


def held_to_one(rows_of_two, rows_of_one):
    """Two processes took the steps of one, in the same phases; the log has the clips of the main process."""
    for two, one in zip(rows_of_two, rows_of_one, strict=True):
        assert [two.get(key) for key in ("phase", "expert", "samples")] == [
            one.get(key) for key in ("phase", "expert", "samples")
        ]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        clips = {str(clip) for clip in two["clips"]}
        assert len(clips) == len(one["clips"]) // 2 and clips < {str(clip) for clip in one["clips"]}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes(engine, unbroken, tiny, sizes, launch, tmp_path):
    """Two processes share out the steps of each phase, and train and validate as one does."""
    launch(engine, *command(tiny, sizes))
    held_to_one(rows(tmp_path), rows(unbroken[0]))
    wanted, found = (measured(folder / "runs/r") for folder in (unbroken[0], tmp_path))
    assert found == pytest.approx(wanted, rel=1e-5) and any(key == "validation_loss" for _, key in wanted)


@pytest.mark.slow
def test_pair(tiny, sizes, call, launch, tmp_path):
    """Of a pair each expert goes through the phases by its own steps; stopped between two borders, and continued by two
    processes, it is the unbroken run.
    """
    both = ("expert=both", f"steps={2 * STEPS}", "validation.every=6")
    call("train.py", *command(tiny, sizes, *both, "run=one"))
    call("train.py", *command(tiny, sizes, *both, "stop_after=7"))
    launch("ddp", *command(tiny, sizes, *both))
    one, two = rows(tmp_path, "one"), rows(tmp_path)
    assert [(row["expert"], row["phase"]) for row in one] == [
        (name, phase) for phase in (0, 1, 2) for _ in range(3) for name in ("high_noise", "low_noise")
    ]
    assert [row["clips"] for row in two[:7]] == [row["clips"] for row in one[:7]]
    held_to_one(two[7:], one[7:])


@pytest.mark.slow
def test_plan(tiny, sizes, call):
    """A dry run has a line for each phase, and memory for each bucket with its own number of clips."""
    said = call("train.py", *command(tiny, sizes, "dry_run=true", "gpu=24GB")).stdout
    assert (
        "from step 0         100% images: 8 per backward x 1 accumulation x 1 process = 8 samples per step, 24 in 3"
        in said
    )
    assert (
        "from step 6         100% video64: 2 per backward x 1 accumulation x 1 process = 2 samples per step, 6 in 3"
        in said
    )
    assert f"steps               {STEPS}: 42 samples" in said
    assert len(re.findall(r"^memory  ", said, flags=re.M)) == 3
    assert re.search(r"TFLOP per step      9x64x64: .* x 2 samples", said)


def test_plan_of_a_pair(call):
    """Of a pair the plan has each expert's own steps, also before the data are there."""
    said = call("train.py", "recipe=wan_tiny_scratch", "expert=both", "steps=6000", "dry_run=true").stdout
    for name in ("high_noise", "low_noise"):
        for start, size, steps in ((0, 64, 1000), (1000, 32, 1500), (2500, 16, 500)):
            line = f"= {size} samples per step, {size * steps} in {steps} steps   ({name})"
            assert re.search(rf"^from step {start} .*{re.escape(line)}$", said, flags=re.M), said
    assert f"steps               6000: {2 * (64_000 + 48_000 + 8_000)} samples" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["epochs=2", "steps=null"], "epochs=2 are passes over one mix"),
        (["steps=6"], r"data\.schedule\[2\]\.from=6 never comes in steps=6"),
        (["accumulate=2", "batch_size=2"], None),
        (["accumulate=4", "batch_size=4"], None),
        (["accumulate=8", "batch_size=8"], r"data\.schedule\[1\]: batch_size=4 must divide by accumulate x processes"),
        (["loss.stratified=true"], r"loss\.stratified=true shares out steps of one size"),
        (["data.caption_dropout=[[0, 0.3], [5, 0]]"], r"data\.caption_dropout by step"),
        (["batch_tokens=100", "batch_size=null"], r"batch_size=8 in data\.schedule: batch_tokens=100"),
        (["data.schedule=[{from: 0, sets: {cats: 1}}]"], r"sets\.cats: there is no such set"),
    ],
)
def test_checked(tiny, sizes, words, said):
    """What a schedule does not go together with is refused before the start."""
    problem = ""
    try:
        checks.check(config.compose("train", [*command(tiny, sizes), *words]))
    except ValueError as error:
        problem = str(error)
    assert re.search(said, problem) if said else problem == ""


def test_unheard(tiny, sizes):
    """A set's own weight beside a schedule has no effect, and is refused."""
    cfg = config.compose("train", command(tiny, sizes, "+data.sets.images.weight=3"))
    found = unheard("train", config.plain(cfg), {"data.sets.images.weight", "data.sets.images.shards"})
    assert found == {
        "data.sets.images.weight": "data.sets.images.weight has no effect: data.schedule says what a set weighs"
    }
