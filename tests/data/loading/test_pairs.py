"""Preference pairs: both clips of a row come back, pairs that share a file are held out together, each bad row is named."""

import itertools

import numpy as np
import pytest
import torch
from shard_helpers import SIZES, encode, shard

from wantrain.data import BatchSampler, ConditioningInputs, LatentData, PairData
from wantrain.data.loading.pairs import connected
from wantrain.demo.footage import draw_shot, make_footage
from wantrain.video import write_mp4


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """24 clips, and a file of three more."""
    folder = tmp_path_factory.mktemp("pairs")
    make_footage(folder / "footage", num_videos=24, num_images=0)
    frames = draw_shot(0, seed=9, size=64).scene.frames(64, 64, fps=16, num_frames=17)
    write_mp4(folder / "footage" / "long.mp4", np.concatenate([frames, frames[::-1], frames]), 16)
    (folder / "footage" / "long.txt").write_text("a long one")
    shard(folder / "footage", folder / "videos", clips="all", rejects_limit=0)
    encode(folder / "videos", folder / "latents", sizes=SIZES, inputs=ConditioningInputs({}, "none"), rejects_limit=0)
    return folder / "latents"


@pytest.fixture(scope="module")
def plain(latents):
    return LatentData(shards=latents, holdout=0.0, caption_dropout=0.0)


def by_bucket(data):
    """Names of clips (`Batch.ids`), by bucket."""
    found = {}
    for clip in range(len(data.index)):
        found.setdefault(data.index.bucket[clip], []).append(data.index.name(data.index.windows_of(clip)[0]))
    return [names for names in found.values() if len(names) > 1]


@pytest.fixture
def table(tmp_path):
    def write(*rows, head="winner,loser"):
        path = tmp_path / "pairs.csv"
        path.write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
        return path

    return write


def opened(latents, path, **more):
    return PairData(shards=latents, pairs=path, **{"holdout": 0.0, "caption_dropout": 0.0, **more})


def test_pairs_load(latents, plain, table):
    """A batch holds the latents of both clips of each pair, the winner's text for both, in every bucket there is."""
    rows = [pair for names in by_bucket(plain) for pair in zip(names[::2], names[1::2], strict=False)]
    data = opened(latents, table(*rows))
    wanted = dict(all_latents(plain))
    sampler, seen = BatchSampler.of(data, batch_size=1, seed=0), set()
    for step in range(len(rows)):
        batch = data.load(sampler.batch(step), [step])
        winner, loser = batch.ids[0], batch.losers.ids[0]
        assert (winner, loser) in rows and batch.losers.positions == batch.positions == (step,)
        assert torch.equal(batch.latents_BCTHW[0], wanted[winner])
        assert torch.equal(batch.losers.latents_BCTHW[0], wanted[loser])
        assert torch.equal(batch.text_BLD, batch.losers.text_BLD)
        seen.add((winner, loser))
    assert seen == set(rows)
    dropped = opened(latents, table(*rows), caption_dropout=1.0).load([0], [0])
    assert torch.equal(dropped.text_BLD[0], data.empty_text) and torch.equal(
        dropped.losers.text_BLD[0], data.empty_text
    )
    by_step = opened(latents, table(*rows), caption_dropout=[[0, 0.0], [1, 1.0]], batch_size=8)
    texts = [by_step.load([0], [place]).text_BLD[0] for place in (7, 8)]  # of step 0, of step 1
    assert [torch.equal(text, data.empty_text) for text in texts] == [False, True]


def all_latents(data):
    for clip in range(len(data.index)):
        window = data.index.windows_of(clip)[0]
        yield data.index.name(window), data._tensors_of(clip, window)["latents"].float()


def test_files_name_clips(latents, plain, table):
    """A clip is named by its file too; a file of several clips is not, and the message names them."""
    files = {}
    for clip in range(len(plain.index)):
        files.setdefault(plain._file_of(clip), []).append(clip)
    alone = [name for name, clips in files.items() if len(clips) == 1]
    same = next(
        (a, b) for a in alone for b in alone if a < b and len({plain.index.bucket[files[n][0]] for n in (a, b)}) == 1
    )
    data = opened(latents, table((*same, "a red ring"), head="winner,loser,prompt"))
    assert [data.train.tolist(), data.losers.tolist()] == [files[same[0]], files[same[1]]]
    with pytest.raises(ValueError, match=r"line 2: long\.mp4 has 3 clips; name one of them: [0-9a-f]{16}-0000"):
        opened(latents, table(("long.mp4", alone[0])))


def test_holdout_by_files(latents, plain, table):
    """A held-out pair shares no file with a training pair; pairs in a chain go together."""
    rows = [pair for names in by_bucket(plain) for pair in itertools.pairwise(names)]
    data = opened(latents, table(*rows), holdout=0.4)
    held = set(range(len(rows))) - {rows.index(pair) for pair in pairs_of(data)}
    assert held and len(data.heldout)
    trained = {name for pair in pairs_of(data) for name in pair}
    assert not trained & {name for number in held for name in rows[number]}
    measured = {name for batch in data.heldout_batches(99) for name in batch.ids}
    assert measured == {rows[number][0] for number in held}
    assert all(batch.losers is None for batch in data.heldout_batches(99)), "winners alone are measured"
    assert connected(np.array([1, 2, 7], "u8"), np.array([2, 3, 8], "u8")).tolist() == [1, 1, 7]
    assert data.fingerprint != plain.fingerprint != opened(latents, table(*rows[:2])).fingerprint


def pairs_of(data):
    def name(clip):
        return data.index.name(data.index.windows_of(clip)[0])

    return [(name(one), name(other)) for one, other in zip(data.train, data.losers, strict=True)]


def test_bad_rows(latents, plain, table):
    """Every row that is no pair is named with its line and the reason, all in one error."""
    first, second = max(by_bucket(plain), key=len)[:2]
    other = next(names[0] for names in by_bucket(plain) if first not in names)
    rows = [(first, second), (first, first), (second, first), (first, "gone.mp4"), (first, other)]
    with pytest.raises(ValueError) as error:
        opened(latents, table(*rows))
    message = str(error.value)
    assert f"line 3: {first} is winner and loser" in message
    assert f"line 4: line 2 compares {second} and {first} already" in message
    assert "line 5: gone.mp4 is none of the 25 files" in message
    assert f"line 6: {first} is " in message and "the two share their noise" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not there"),
        ("winner\na\n", "has no column loser"),
        ("winner,loser\n", "holds no pair"),
        ("winner,loser\na,\n", "line 2 names only one clip"),
    ],
)
def test_bad_tables(content, said, latents, tmp_path):
    """A table that is none is one error; so is no table."""
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=said):
        opened(latents, path)
    with pytest.raises(ValueError, match=r"give data\.pairs=FILE"):
        opened(latents, None)
