"""Every key of every command set to values of every kind: what is refused is one line that names the key."""

import functools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, base
from omegaconf.errors import OmegaConfBaseException

from wantrain import checks, config
from wantrain.settings import words

VALUES = ("word", "-1", "0", "null", "1.5", "[1,two]", "true", "{a: 1}")
#: Compositions that together have every option's keys; of a later one only the keys that no earlier one has.
COMPOSED = {
    "caption": ((),),
    "shard": ((),),
    "encode": ((),),
    "sample": ((), ("model=tiny_dense",), ("model=ti2v_5b",)),
    "export": ((),),
    "doctor": ((),),
    "train": (
        (),
        ("adapter=lora", "expert=both", "noise=table", "optimizer=muon"),
        ("adapter=partial", "adapter.layers=0-3", "noise=beta", "optimizer=adafactor", "model=tiny_ti2v", "expert=dense"),
        ("noise=by_resolution", "optimizer=adamw_8bit", "data=mixed", "data.sets={a: {shards: x}}", "model=t2v_a14b"),
        ("noise=diffsynth", "optimizer=other"),
        ("noise=flux", "schedule=wsd"),
        ("noise=mode",),
        ("recipe=wan_tiny_vae_images",),
    ),
}  # fmt: skip
REQUIRED = {"caption": ("source=x",), "shard": ("source=x", "out=y"), "encode": ("shards=x", "out=y")}


@functools.cache
def composed(command, arguments):
    return config.compose(command, [*REQUIRED.get(command, ()), *arguments])


def keys_of(cfg, prefix=""):
    """Every key of a config, groups included."""
    for key, node in cfg.items_ex(resolve=False):
        yield f"{prefix}{key}"
        if isinstance(node, DictConfig):
            yield from keys_of(node, f"{prefix}{key}.")


def cases():
    for command, compositions in COMPOSED.items():
        seen = set()
        for arguments in compositions:
            keys = [key for key in keys_of(composed(command, arguments)) if key not in seen]
            seen |= set(keys)
            yield command, arguments, keys


@pytest.fixture(scope="module", autouse=True)
def quick_grammar():
    """The same few interpolations are parsed for every value: each is parsed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "parse", functools.cache(base.parse))
        yield


def updated(cfg, word):
    """The config with one more word of the command line, as Hydra updates it."""
    (override,) = OverridesParser.create().parse_overrides([words.quoted(word)])
    changed = cfg.copy()
    OmegaConf.update(changed, override.key_or_group, override.value(), merge=True)
    return changed


def refusal(cfg, *more):
    """The error of a config with more words; None if it passes. Anything but an error for users is raised."""
    try:
        checks.check(functools.reduce(updated, more, cfg))
    except ValueError as error:
        return str(error)
    except OmegaConfBaseException as error:
        return config._readable(error, "train")
    return None


def lines_of(error):
    return [line.removeprefix("  - ") for line in error.splitlines() if not line.endswith("problems:")]


CASES = list(cases())


@pytest.mark.parametrize(
    ("command", "arguments", "keys"), CASES, ids=[f"{name}-{'-'.join(arguments)[:40]}" for name, arguments, _ in CASES]
)
def test_values_of_every_kind(command, arguments, keys):
    """No key takes a value of a wrong kind to a traceback; a refusal names the key, or the place it refers to."""
    cfg = composed(command, arguments)
    assert refusal(cfg) is None, "what is composed is right"
    groups = {path.name for path in config.CONF.iterdir() if path.is_dir()}
    refused = 0
    for key in keys:
        if key in groups:
            continue
        for value in VALUES:
            error = refusal(cfg, f"{key}={value}")
            if error is not None:
                refused += 1
                names = [key, key.split(".")[-1]]
                assert any(name in line for line in lines_of(error) for name in names), f"{key}={value}: {error}"
                assert all(len(line) < 700 for line in lines_of(error)), error
    assert refused > len(keys), "most keys take values of one kind only"


@pytest.mark.parametrize("command", list(COMPOSED))
def test_groups_set_to_one_word(command):
    """A group set to one word is one line that says how its keys are given."""
    cfg = composed(command, ())
    groups = [key for key in keys_of(cfg) if isinstance(OmegaConf.select(cfg, key), DictConfig)]
    options = {path.name for path in config.CONF.iterdir() if path.is_dir()}
    for key in sorted(set(groups) - options):
        error = refusal(cfg, f"{key}=word")
        assert error is not None and "\n" not in error, f"{key}=word: {error}"
        (line,) = lines_of(error)
        assert line.startswith(f"{key}=word must be"), line
