"""Several sets behind the face of one: the same samples, each set's own validation, and what does not fit refused."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from wantrain.data import BatchSampler, LatentData, MixedData
from wantrain.demo.footage import make_footage


@pytest.fixture(scope="module")
def other(tiny, inside, tmp_path_factory):
    """Another set, of other footage, encoded like `tiny`; one of its two videos is a video of `tiny` too."""
    folder = tmp_path_factory.mktemp("other")
    make_footage(folder / "footage", num_videos=3, num_images=1, size=32, seed=100)
    shared = sorted(tiny.footage.glob("*.mp4"))[0]
    for path in (shared, shared.with_suffix(".txt")):
        shutil.copy(path, folder / "footage" / f"shared{path.suffix}")
    inside(folder, "shard.py", "source=footage", "out=videos", "num_frames=9")
    inside(folder, "encode.py", "shards=videos", "out=latents", f"weights={tiny.base}", "area=1024")
    return folder / "latents"


def mixed(tiny, other, **settings):
    sets = {"ours": {"shards": tiny.latents, "weight": 3}, "theirs": {"shards": str(other)}}
    return MixedData(sets=sets, **{"holdout": 0.0, "caption_dropout": 0.0, **settings})


def test_mixture_samples(tiny, other, capsys):
    """A mixture has the samples of its sets."""
    parts = {"ours": LatentData(shards=tiny.latents, holdout=0, caption_dropout=0.5, seed=3)}
    parts["theirs"] = LatentData(shards=other, holdout=0, caption_dropout=0.5, seed=3)
    data = mixed(tiny, other, caption_dropout=0.5, seed=3)
    said = capsys.readouterr().out
    assert f"data.sets.ours: {len(parts['ours'].train)} clips, 75.0% of the samples" in said
    assert data.bucket_names == [name for part in parts.values() for name in part.bucket_names]
    assert len(data.train) == len(data.buckets) == len(data.sets) == len(data.bucket_names)
    assert data.shares == (3.0, 1.0)
    first = 0
    for number, (name, part) in enumerate(parts.items()):
        for sample in range(len(part.train)):
            place = 7 * sample
            alone, ours = part.load([sample], [place]), data.load([first + sample], [place])
            assert data.sets[first + sample] == number
            assert ours.ids == (f"{name}/{alone.ids[0]}",)
            assert data.view(ours.ids[0]) == part.view(alone.ids[0])
            assert ours.positions == alone.positions
            assert (ours.latents_BCTHW == alone.latents_BCTHW).all()
            assert (ours.text_BLD == alone.text_BLD).all()
        first += len(part.train)


def test_mixed_batch_order(tiny, other):
    """A batch from several sets is in the order of the sampler."""
    data = mixed(tiny, other)
    plan = BatchSampler.of(data, batch_size=8, seed=0)
    owners = []
    for step in range(40):
        samples = plan.batch(step)
        batch = data.load(samples, range(step * 8, step * 8 + 8))
        assert batch.positions == tuple(range(step * 8, step * 8 + 8))
        assert len({data.bucket_names[sample] for sample in samples}) == 1
        for row, sample in enumerate(samples):
            alone = data.load([sample], [0])
            assert batch.ids[row] == alone.ids[0]
            assert (batch.latents_BCTHW[row] == alone.latents_BCTHW[0]).all()
            length = alone.text_BLD.shape[1]
            assert (batch.text_BLD[row, :length] == alone.text_BLD[0]).all()
            assert not batch.text_BLD[row, length:].any()
        owners += data.sets[samples].tolist()
    assert np.mean(np.array(owners) == 0) == pytest.approx(0.75, abs=0.03)


def test_each_set_is_validated(tiny, other):
    data = mixed(tiny, other, holdout=0.3)
    for batches, side in ((data.heldout_batches(4), "heldout"), (data.train_batches(4), "train")):
        ids, clips = (list(itertools.chain(*own)) for own in zip(*((b.ids, b.clips) for b in batches), strict=True))
        tags, files = data.tags_of(clips), data.groups_of(clips)
        assert [own.split("/")[0] for own in ids] == [first for first, *_ in tags]
        assert {name: sum(first == name for first, *_ in tags) for name in data.parts} == {"ours": 2, "theirs": 2}
        for own, file in zip(ids, files, strict=True):
            name, clip = own.split("/")
            part = data.parts[name]
            (number,) = [n for n in getattr(part, side) if part.index.name(part.index.windows_of(n)[0]) == clip]
            assert file == part.index.group[number]
    assert set(data.captions()) == {caption for part in data.parts.values() for caption in part.captions()}


def test_holdout_across_sets(tiny, other, capsys):
    """No held-out clip is trained on in another set.

    The shared file is held out with the half of one set, and trained on in the other, which holds none out.
    """
    source = set(LatentData(shards=tiny.latents, holdout=0).index.source.tolist())
    source &= set(LatentData(shards=other, holdout=0).index.source.tolist())
    assert len(source) == 1
    found = 0
    for seed in range(8):
        sets = {"ours": {"shards": tiny.latents, "holdout": 0.5}, "theirs": {"shards": other, "holdout": 0.0}}
        data = MixedData(sets=sets, seed=seed)
        alone = LatentData(shards=tiny.latents, holdout=0.5, seed=seed)
        leaks = source <= set(alone.index.source[alone.heldout].tolist())
        found += leaks
        assert ("trained on in another set" in capsys.readouterr().out) == leaks
        left = set(data.parts["ours"].index.source[data.parts["ours"].heldout].tolist())
        assert left == set(alone.index.source[alone.heldout].tolist()) - source
    assert 0 < found < 8


def spoiled(folder, tmp_path, **facts):
    copy = Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **facts}))
    return copy


@pytest.mark.parametrize("facts", [{"vae_fingerprint": "x"}, {"text_encoder_fingerprint": "x"}, {"text_dim": 7}])
def test_other_encoders_refused(tiny, other, tmp_path, facts):
    """Sets of different encoders are refused."""
    with pytest.raises(ValueError, match=rf"ours and theirs were not encoded alike \({next(iter(facts))} .*encode\.py"):
        mixed(tiny, spoiled(other, tmp_path, **facts))


def test_mixture_fingerprint(tiny, other, tmp_path):
    """The fingerprint depends on the names and contents of the sets, not on their order."""
    ours = {"shards": tiny.latents}
    data = mixed(tiny, other)
    again = MixedData(sets={"theirs": {"shards": other}, "ours": ours})
    assert again.fingerprint == data.fingerprint
    named = MixedData(sets={"mine": {"shards": other}, "ours": ours})
    changed = mixed(tiny, spoiled(other, tmp_path, note="x"))
    assert len({data.fingerprint, named.fingerprint, changed.fingerprint}) == 3


def test_bad_sets_are_refused(tiny):
    good = {"shards": str(tiny.latents)}
    for sets, said in (
        (None, "data=mixed needs sets"),
        ({}, "data=mixed needs sets"),
        ({"a": "DIR"}, r"data\.sets\.a=DIR has no shards"),
        ({"a": {"weight": 1}}, "has no shards"),
        ({"a": {**good, "wieght": 1}}, r"data\.sets\.a\.wieght is not a setting of a set; choose from .*weight"),
        ({"a": good, "b": {**good, "weight": 0}}, r"data\.sets\.b\.weight=0 must be a number above 0"),
        ({"a": {**good, "weight": "much"}}, r"data\.sets\.a\.weight=much must be"),
        ({"a": good, "b": {"shards": "nowhere"}}, r"data\.sets\.b: nowhere holds no shards"),
    ):
        with pytest.raises(ValueError, match=said):
            MixedData(sets=sets)


def test_mixture_resume(tiny, other, call, tmp_path):
    """A run on a mixture validates each set and resumes bit for bit."""
    base = [setting for setting in tiny.train if not setting.startswith(("data.shards=", "validation.every="))]
    moved = Path(shutil.copytree(other, tmp_path / "moved"))

    def train(name, steps, *more, theirs=other, weight=0.3, check=True):
        sets = f"data.sets={{ours: {{shards: {tiny.latents}, weight: 0.7}}, theirs: {{shards: {theirs}, weight: {weight}}}}}"
        how = ("data=mixed", "data.holdout=0.3", "batch_size=4", "schedule=constant", "validation.every=10")
        return call("train.py", *base, *how, sets, f"run={name}", f"steps={steps}", *more, check=check)

    def log(name):
        return [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]

    train("whole", 6)
    train("parts", 3)
    train("parts", 6, theirs=moved)
    assert log("whole")[0]["validation_by_tag"].keys() == {"ours", "theirs"}
    whole, parts = ([row["loss"] for row in log(name) if "loss" in row] for name in ("whole", "parts"))
    assert whole == parts
    assert "data.sets.theirs.weight: 0.3 -> 0.4" in train("parts", 7, weight=0.4, check=False).error
    assert "data=mixed needs sets" in call("train.py", *base, "data=mixed", check=False).error
    assert "data.sets.theirs.weight=-1" in train("parts", 7, weight=-1, check=False).error
