"""Advice on footage: each rule on files made for it, and the settings file that is written."""

import pytest
import yaml

from wantrain import config, geometry
from wantrain.data.advice.advice import HOLDOUT, RECIPES, Places, advise
from wantrain.data.advice.overview import FileFacts, Overview
from wantrain.data.advice.writing import check_file, settings_file_of, settings_text
from wantrain.data.footage import sharding
from wantrain.data.footage.tally import Tally
from wantrain.data.rejects import Reject
from wantrain.settings.settings_file import read, taken_out
from wantrain.settings.words import quoted


@pytest.fixture(autouse=True)
def detector(monkeypatch):
    """Scene detection counts as installed: no frame is looked at here."""
    monkeypatch.setattr(sharding, "library", lambda: None)


class Listed(Overview):
    """An overview of files that are only listed: every file is one clip."""

    def select(self, options):
        self.options, selector = options, options.selector()
        for reject in self.rejects:
            selector.reject(reject)
        for _ in self.files:
            selector.stats.files.use(1)
            selector.stats.use_clip(1.0)
        used = [{"height": each.height, "width": each.width, "windows": [{}]} for each in self.files]
        return selector, used


def video(name="a.mp4", seconds=6.0, height=480, width=832, rate=24.0, **more):
    scenes = seconds if isinstance(seconds, tuple) else (seconds,)
    return FileFacts(name, height, width, rate, scenes, **{"caption": 'He said: "no", # twice', **more})


def image(name="a.png", height=480, width=832):
    return FileFacts(name, height, width, 1.0, ())


def advice(*files, model="t2v_a14b", without=(), split=True, captions=None, rejects=()):
    """(settings of the commands by command.key, lines of trouble) for these files."""
    facts = config.plain(config.compose("shard", [f"model={model}"]).model)
    sizes = config.buckets(config.compose("encode", [f"model={model}"]))
    captions = [f"a caption of {each.name}" for each in files] if captions is None else captions
    source = Places(settings_file_of("clips", None)).file.with_suffix("")
    overview = Listed(source, split, list(rejects), Tally(), list(files), captions, list(without))
    given = advise(overview, facts, sizes, Places(settings_file_of("clips", None)))
    return {f"{each.command}.{each.key}".lstrip("."): each for each in given.settings}, "\n".join(given.trouble), given


@pytest.mark.parametrize(
    ("seconds", "num_frames"),
    [
        ([6.0] * 5, 81),  # all fill the model's 81 frames at 16 a second
        ([6.0] * 3 + [3.0] * 2, 81),  # three of five do
        ([6.0] * 2 + [3.0] * 3, 45),  # half of them fill 45: floor(48) -> 45
        ([(2.0, 2.0), (2.0, 2.0)], 29),  # scenes count, not files
        ([0.2, 6.0], 81),  # too short for any clip: of the rest all fill it
    ],
)
def test_length_of_clips(seconds, num_frames):
    """The longest clip that half of the scenes fill."""
    settings, _, _ = advice(*(video(seconds=each) for each in seconds))
    assert settings["shard.num_frames"].value == num_frames


def test_many_lengths():
    """More lengths than a few are brought to three, and 1 where there are stills."""
    videos = [video(seconds=frames / 16) for frames in (81, 81, 81, 81, 77, 61, 33, 9)]
    assert advice(*videos)[0]["shard.lengths"].value == [17, 37, 81]
    assert advice(*videos, image())[0]["shard.lengths"].value == [1, 17, 37, 81]
    assert "shard.lengths" not in advice(*videos[:6])[0]


def test_stills():
    """Stills alone are clips of one frame, and motion is named as what is missing."""
    settings, trouble, _ = advice(*(image(f"{number}.png") for number in range(30)))
    assert settings["shard.num_frames"].value == 1 and "shard.scenes" not in settings
    assert "stills only" in trouble and "motion needs videos" in settings["train.recipe"].why
    assert "1 stills beside 30 videos" in advice(*[video()] * 30, image())[1]


def test_scenes():
    """Cuts are split where they can be found; where they cannot, the extra is named."""
    settings, trouble, _ = advice(video(seconds=(3.0, 3.0, 3.0)), video())
    assert settings["shard.scenes"].value == "split" and settings["shard.scenes"].why.startswith("2 cuts in 1 videos")
    settings, trouble, _ = advice(video(), split=False)
    assert "shard.scenes" not in settings and "wantrain[scenes]" in trouble


def test_special_files():
    """Interlaced and static files get their settings; a folder in which nothing moves is trouble."""
    settings, _, _ = advice(video("a.mp4", interlaced=True), video("b.mp4", still=True), video("c.mp4", still=True))
    assert settings["shard.interlaced"].value == "deinterlace" and "a.mp4" in settings["shard.interlaced"].why
    assert settings["shard.static"].value == "drop" and "2 files (first: b.mp4)" in settings["shard.static"].why
    settings, trouble, _ = advice(video(still=True))
    assert "shard.static" not in settings and "nothing moves" in trouble


@pytest.mark.parametrize(
    ("shape", "area", "left"),
    [((480, 832), None, False), ((240, 416), [399360, 199680], False), ((120, 208), [399360, 49920], False),
     ((16, 16), None, True)],
)  # fmt: skip
def test_small_files(shape, area, left):
    """Files that would be enlarged too much get the largest smaller area that takes them; else they are named."""
    settings, trouble, _ = advice(*[video(height=shape[0], width=shape[1])] * 3)
    assert (settings["encode.area"].value if "encode.area" in settings else None) == area
    assert ("3 files would be enlarged" in trouble) == left
    if area:
        aspects = config.compose("encode").aspects
        buckets = geometry.Buckets(tuple(area), tuple(aspects), 16, upscale=1.5)
        assert buckets.choose(81, *shape)  # encode.py takes them


def test_shapes():
    """A shape far from the buckets' gets one of its own."""
    settings, _, _ = advice(*[video(height=360, width=860)] * 4)
    assert settings["encode.aspects"].value[-1] == pytest.approx(2.389) and len(settings["encode.aspects"].value) == 6
    assert "encode.aspects" not in advice(video(height=480, width=832))[0]


def test_rates_and_captions():
    """Slow footage, missing captions and captions that are all the same are trouble."""
    _, trouble, _ = advice(video("slow.mp4", rate=8.0), video(rate=16.0), without=["slow.mp4"])
    assert "slow.mp4: fewer frames per second than the model's 16" in trouble
    assert "slow.mp4: no caption; python caption.py config=FILE" in trouble
    assert "all captions are the same" in advice(video(), video(), captions=["x", "x"])[1]
    rejects = [Reject(f"{number}.mp4", "is broken") for number in range(7)]
    trouble = advice(video(), rejects=rejects)[1]
    assert "0.mp4: is broken" in trouble and "2 more files" in trouble
    assert "7 of 8 files cannot be used, more than rejects.limit=0.1 allows: shard.py stops" in trouble
    assert "shard.py stops" not in advice(*[video()] * 9, rejects=rejects[:1])[1]


def test_few_clips():
    """Few clips are named; one file is held out where the default share would hold out none."""
    settings, trouble, _ = advice(*[video()] * 5, model="tiny")
    assert "5 clips are few" in trouble and "are few" not in advice(*[video()] * 20)[1]
    assert settings["train.data.holdout"].value == 0.2 and settings["train.batch_size"].value == 5
    for count in range(4, 30):
        settings, _, _ = advice(*[video()] * count, model="tiny")
        share = settings["train.data.holdout"].value if "train.data.holdout" in settings else HOLDOUT
        assert round(share * count) >= 1, count
    assert config.compose("train").data.holdout == HOLDOUT


@pytest.mark.parametrize("model", ["t2v_a14b", "i2v_a14b", "ti2v_5b", "t2v_1_3b", "t2v_14b", "tiny", "tiny_dense"])
def test_written_file_composes(model, tmp_path):
    """The file that is written is YAML, and every command takes its section as it was meant."""
    files = [video(f"{number}.mp4") for number in range(5)]
    _, _, given = advice(*files, model=model)
    file = tmp_path / "clips.yaml"
    file.write_text(settings_text(given.settings, file.with_suffix(""), model), encoding="utf-8")
    assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) >= {"model", "run", "shard", "encode", "train"}
    for command in ("caption", "shard", "encode", "train", "sample", "export"):
        words = [quoted(word) for word in taken_out([f"config={file}"], command)[1].words]
        cfg = config.compose(command, taken_out([f"config={file}"], command)[1].words)
        assert cfg.model.name == model and words
        if command == "train":
            both = model in {"t2v_a14b", "i2v_a14b", "tiny"}
            assert cfg.expert.name == ("both" if both else "dense") and cfg.adapter.name == "lora"
            assert (cfg.run, cfg.data.shards) == ("clips", "data/clips/latents")
    assert read(file, "sample")["prompt"] == 'He said: "no", # twice'


def test_recipes_are_of_their_models():
    """Each recipe that is advised is there, and chooses the model it is advised for."""
    for model, recipes in RECIPES.items():
        for recipe in recipes:
            assert config.compose("train", [f"recipe={recipe}"]).model.name == model


@pytest.mark.parametrize(
    ("source", "out", "file"),
    [
        ("my clips/", None, "my_clips.yaml"),
        ("a/b.c", None, "b_c.yaml"),
        ("/", None, "footage.yaml"),
        ("x", "y.yml", "y.yml"),
    ],
)
def test_names_of_the_file(source, out, file):
    """The folder's name, with signs that a run's name may have; or what is given."""
    assert str(settings_file_of(source, out)) == file


def test_a_file_is_never_overwritten(tmp_path):
    """A file that is there, and a name with another ending, are errors that name the fix."""
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ValueError, match=r"never overwritten; remove it, or give another name: out=OTHER\.yaml"):
        check_file(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=r"out=data must end in \.yaml"):
        settings_file_of("clips", "data")
