"""The settings file: what its sections become, what the command line replaces, and what it refuses."""

import pytest

from wantrain import config
from wantrain.settings.settings_file import SHARED, read, taken_out
from wantrain.settings.words import quoted

TEXT = """
model: tiny          # for every command
run: mine
shard:
  source: my, clips
  out: data/mine/videos
  lengths: [9, 17]
  scenes: off
  caption.prefix: "ohwx, a dog: "
  caption: {default: ""}
encode: {shards: data/mine/videos, out: data/mine/latents, mask_types: {image: 1.0}, tokens: }
train:
  expert: both
  adapter: lora
  recipe: wan_tiny_dense,wan_tiny_low_noise
  sample: 50
  optimizer: {lr: 1e-4}
  experts.high_noise.rank: 4
  data.shards: data/mine/latents
sample:
  lora.low_noise: [one.safetensors, my files/two.safetensors]
  prompt: >-
    a cat, (asleep)
    = well
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_each_command_reads_its_own(file):
    """Keys, dotted or nested, with the text that would be typed; what is shared goes to those that know it."""
    assert read(file, "shard") == {
        "model": "tiny", "source": "my, clips", "out": "data/mine/videos", "lengths": "[9, 17]", "scenes": "off",
        "caption.prefix": "ohwx, a dog: ", "caption.default": "",
    }  # fmt: skip
    assert read(file, "encode") == {
        "model": "tiny", "shards": "data/mine/videos", "out": "data/mine/latents", "mask_types": "{image: 1.0}",
        "tokens": "null",
    }  # fmt: skip
    assert read(file, "train")["optimizer.lr"] == "1e-4"
    assert read(file, "sample")["lora.low_noise"] == "[one.safetensors, my files/two.safetensors]"
    assert read(file, "sample")["prompt"] == "a cat, (asleep) = well"
    assert read(file, "export") == {"model": "tiny", "run": "mine"}
    assert read(file, "caption") == {"model": "tiny"}


@pytest.mark.parametrize("command", ["shard", "encode", "train", "sample", "export"])
def test_it_composes(command, file):
    """Hydra takes every word of it, and reads what was meant."""
    words = taken_out([f"config={file}"], command)[1].words
    cfg = config.compose(command, [word for word in words if "recipe" not in word])
    assert cfg.model.name == "tiny"
    if command == "shard":
        assert (cfg.source, cfg.scenes, cfg.lengths) == ("my, clips", "off", [9, 17])
        assert (cfg.caption.prefix, cfg.caption.default) == ("ohwx, a dog: ", "")
    elif command == "encode":
        assert (cfg.mask_types, cfg.tokens) == ({"image": 1.0}, None)
    elif command == "train":
        assert (cfg.expert.name, cfg.adapter.name, cfg.sample.every, cfg.optimizer.lr) == ("both", "lora", 50, 1e-4)
        assert (cfg.run, cfg.experts.high_noise.rank) == ("mine", 4)
    elif command == "sample":
        assert cfg.prompt == "a cat, (asleep) = well"


def test_the_command_line_wins(file):
    """A setting that is typed leaves the file's out, in whatever spelling; the others stay."""
    typed, from_file = taken_out([f"config={file}", "sample=off", "model=tiny_dense", "optimizer.lr=2"], "train")
    assert typed == ["sample.every=0", "model=tiny_dense", "optimizer.lr=2"]
    assert from_file.words == [
        "run=mine", "expert=both", "adapter=lora", "recipe=[wan_tiny_dense,wan_tiny_low_noise]",
        "experts.high_noise.rank=4", "data.shards=data/mine/latents",
    ]  # fmt: skip
    words = taken_out([f"config={file}", "prompts=list.txt"], "sample")[1].words
    assert [word.split("=")[0] for word in words] == ["model", "run", "lora.low_noise"]
    assert taken_out(["sample=50"], "train") == (["sample.every=50"], None)


def test_commas_in_a_sweep(file):
    """With -m the typed commas separate values; those of the file do not."""
    words = taken_out([f"config={file}", "-m", "seed=0,1"], "shard")[1].words
    assert quoted(next(word for word in words if word.startswith("source=")), sweep=True) == 'source="my, clips"'
    recipe = [word for word in taken_out([f"config={file}", "-m"], "train")[1].words if "recipe" in word]
    assert recipe == ["recipe=[wan_tiny_dense,wan_tiny_low_noise]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 1}", "trian is no command and no setting that all commands share; did you mean train?"),
        ("optimizer.lr: 1", "optimizer.lr is no command and no setting"),
        ("encode: {stpes: 1}", "encode.stpes is no setting of encode.py"),
        ("train: {stpes: 1}", "train.stpes is no setting of train.py; did you mean train.steps?"),
        ("train: fast", "train: fast is no section; write key: value below train:"),
        ("train: {steps: 1, steps: 2}", "'steps' stands twice"),
        ("train: [", "is no YAML"),
        ("- train", "holds no settings"),
    ],
)
def test_what_is_refused(text, message, tmp_path):
    """Whichever command reads the file, a section or setting that there is not is an error that names the nearest."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        read(path, "train")
    assert message in str(caught.value)


def test_no_file(tmp_path):
    """A file that is not there is an error that says how one is made; an empty one sets nothing."""
    with pytest.raises(ValueError, match=r"cannot be read \(No such file.*shard\.py init=FOLDER"):
        read(tmp_path / "mine.yaml", "train")
    (tmp_path / "mine.yaml").write_text("# nothing yet\ntrain:\n")
    assert read(tmp_path / "mine.yaml", "train") == {}
    with pytest.raises(ValueError, match="given 2 times"):
        taken_out(["config=a", "config=b"], "train")


def test_shared_settings_exist():
    """What is shared is a key, or a group, of each command that takes it."""
    for key, commands in SHARED.items():
        for command in commands:
            assert key in config.compose(command), (key, command)
