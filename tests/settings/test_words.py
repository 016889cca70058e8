"""The words of a command line: shorthands, sweeps and their names."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from wantrain import config
from wantrain.settings.words import expanded, is_sweep, quoted, refuse_choices, swept_name


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("tracker=off", ["tracker=jsonl"]),
        ("tracker=null", ["tracker=jsonl"]),
        ("tracker=none", ["tracker=jsonl"]),
        ("recipe=null", []),
        ("recipe=one,other", ["recipe=[one,other]"]),
        ("recipe=[one,other]", ["recipe=[one,other]"]),
        ("validation=null", ["validation=null"]),
        ("sample=50", ["sample.every=50"]),
        ("sample=off", ["sample.every=0"]),
        ("checkpoint=100", ["checkpoint.every=100"]),
        ("validation=200", ["validation.every=200"]),
        ("validation=100,200", ["validation.every=100,200"]),
        ("validation=off", ["validation.every=0"]),
        ("validation=false", ["validation.every=0"]),
        (
            "safeguards=off",
            [f"safeguards.{key}=null" for key in ("spike", "refuse", "unlearning", "unlearning_stop", "hang")],
        ),
        ("checkpoint=off", ["checkpoint=off"]),
        ("sample=often", ["sample=often"]),
        ("sample.every=5", ["sample.every=5"]),
        ("prompt=off", ["prompt=off"]),
    ],
)
def test_shorthands(word, meaning):
    """A group set to off or to a number means what it obviously means; any other word stays for the check."""
    assert expanded([word]) == meaning


def test_shorthands_compose():
    """The command's config has what the shorthands mean."""
    cfg = config.compose("train", ["tracker=off", "sample=5", "checkpoint=7", "validation=off", "safeguards=off"])
    assert (cfg.tracker.name, cfg.sample.every, cfg.checkpoint.every, cfg.validation.every) == ("jsonl", 5, 7, 0)
    assert cfg.safeguards.spike is None and cfg.safeguards.hang is None and cfg.safeguards.max_skipped_steps == 3


def test_recipes_compose():
    """Several recipes are composed, the later over the earlier."""
    cfg = config.compose("train", ["recipe=wan_tiny_dense,wan_tiny_low_noise"])
    assert (cfg.run, cfg.optimizer.lr, cfg.init) == ("wan_tiny_low_noise", 1.5e-3, "scratch")


GROUPS = sorted(path.name for path in config.CONF.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    "value", ["5", "-1", "1.5", "null", "true", "", "[tiny]", "[wandb,jsonl]", "jsonl,wandb", "a b"]
)
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_options_takes_one_option(group, value):
    """A number, nothing or a list chooses no option: one line with the group, the value and the options."""
    if expanded([f"{group}={value}"]) != [f"{group}={value}"] or (group == "recipe" and "," in value):
        return  # a shorthand, or several recipes
    with pytest.raises(ValueError, match=rf"^{group}=") as refused:
        config.compose("train", [f"{group}={value}"])
    error = str(refused.value)
    assert error.startswith(f"{group}={value} must be one of ") and "\n" not in error
    assert all(option.stem in error for option in (config.CONF / group).glob("*.yaml"))
    assert ("-m runs one after the other" in error) == ("," in value)


def test_options_in_a_sweep():
    """With -m a group takes several options, and Hydra's own words for them."""
    choices = {"adapter": ["lora", "none"]}
    for value in ("lora", "lora,none", "lora, none", "choice(lora,none)", "glob(*)", "'lora',none"):
        refuse_choices([f"adapter={value}"], choices, sweep=True)
    for value in ("lora,5", "[lora,none]", "null"):
        with pytest.raises(ValueError, match="must be one of lora, none"):
            refuse_choices([f"adapter={value}"], choices, sweep=True)
    refuse_choices(["adapter.rank=5", "adapter={rank: 5}", "adapter=from_elsewhere", "adapter='lora'"], choices)


def test_unknown_key_in_a_mapping():
    """The error for a mapping names the keys that there are, not the mapping's own name as unknown."""
    with pytest.raises(HydraException) as refused:
        config.compose("train", ["experts={foo: 4}"])
    error = config._readable(refused.value, "train")
    assert error.startswith("experts={...} sets a key that there is not; there are experts.share, ")


def values(word):
    """The values that Hydra sweeps over, or the single one."""
    (override,) = OverridesParser.create().parse_overrides([quoted(word, sweep=True)])
    if not override.is_sweep_override():
        return [override.value()]
    singles = [f"{override.key_or_group}={each}" for each in override.sweep_string_iterator()]
    return [each.value() for each in OverridesParser.create().parse_overrides(singles)]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("prompt=a cat,a dog (small)", ["a cat", "a dog (small)"]),
        ('prompt="a cat, a dog",a bird', ["a cat, a dog", "a bird"]),
        ("prompt='a cat, a dog'", ["a cat, a dog"]),
        ("prompt=一只猫，在草地上,狗", ["一只猫，在草地上", "狗"]),
        ("data.shards=one,two/three", ["one", "two/three"]),
        ("weights=null,there", [None, "there"]),
        ("seed=0,1", [0, 1]),
        ("optimizer.lr=1e-4,2e-4", [1e-4, 2e-4]),
    ],
)
def test_sweeps_over_text(word, found):
    """With -m a comma separates values of text and paths too; quotes keep it."""
    assert values(word) == found


def test_comma_is_text_without_sweep():
    """Without -m a comma in a text is text."""
    (override,) = OverridesParser.create().parse_overrides([quoted("prompt=a cat, a dog")])
    assert not override.is_sweep_override() and override.value() == "a cat, a dog"
    assert is_sweep(["-m", "seed=0,1"]) and is_sweep(["--multirun"]) and not is_sweep(["seed=0"])


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ({"optimizer.lr": "0.0001"}, "r_lr_0.0001"),
        ({"seed": "1", "adapter": "lora"}, "r_seed_1_adapter_lora"),
        ({"data.shards": "a/b"}, "r_4"),
        ({"model.mask_types": "{image: 1}"}, "r_4"),
    ],
)
def test_swept_names(swept, name):
    """A run of a sweep is named by what is swept, or by its number where a value makes no name."""
    assert swept_name("r", swept, 4) == name


@pytest.mark.slow
def test_sweep(tiny, call, tmp_path):
    """Two learning rates, then two seeds: four runs with four names; a run of a sweep goes on by its own name."""
    command = ("train.py", *tiny.train, "-m", "batch_size=2", "steps=1", "validation=off")
    said = call(*command, "run=r", "optimizer.lr=1e-4,2e-4").stdout
    assert "sweep, number 0: optimizer.lr=0.0001" in said and "sweep, number 1: optimizer.lr=0.0002" in said
    call(*command, "seed=0,1")
    runs = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    names = {path.name for path in runs}
    assert names == {"r_lr_0.0001", "r_lr_0.0002", "tiny_low_noise_none_seed_0", "tiny_low_noise_none_seed_1"}
    assert all((path / "checkpoints" / "step_000001").is_dir() for path in runs)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "Hydra leaves no file of its own"


@pytest.mark.parametrize("word", ["~optimizer", "~clip", "~optimizer.lr", "~expert=low_noise"])
def test_deleted_key(word, call):
    """A key that is taken away is one line at once, not a missing key wherever the command first needs it."""
    ended = call("train.py", word, "data.shards=nowhere", check=False)
    assert ended.error.startswith(f"{word} takes a key away") and ended.stderr.count("\n") == 1
