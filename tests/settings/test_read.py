"""Whole commands with a config that notes which keys are read: what nobody reads is refused when it is given."""

import re
import shutil
import sys

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from tiny_vlm import write_llava

from wantrain import checks, config
from wantrain.settings import heard

#: Who writes a whole config down, or compares it: no use of its settings.
RECORDS = (
    "json",
    "yaml",
    "copy",
    "wantrain.runs.folder",
    "wantrain.runs.replay",
    "wantrain.runs.checkpoint",
    "wantrain.settings",
    "wantrain.training.monitoring.trackers",
)


#: Keys that are read elsewhere than in these runs, by pattern.
ELSEWHERE = {
    "train": (
        r"model\.(sampling_steps|guidance\..*)",  # export.py takes them from the run
        r"model\.scratch",  # where the base does not hold the expert
        r"expert\.(high|low)_noise\..*",  # of a pair; as `expert` of that expert's own config
    ),
    "sample": (
        r"model\.transformer\..*",  # where the weights' layout has no config of its own
        r"width",  # with height; alone it is refused
    ),
    "export": (r"model\.transformer\..*",),
}


class Noted(dict):
    """A plain config that notes the keys read from it."""

    def __init__(self, values, prefix, seen):
        super().__init__((key, noted(value, f"{prefix}{key}.", seen)) for key, value in values.items())
        self.prefix, self.seen = prefix, seen

    def note(self, *keys):
        if not sys._getframe(2).f_globals.get("__name__", "").startswith(RECORDS):
            self.seen.update(f"{self.prefix}{key}" for key in keys)

    def __getitem__(self, key):
        self.note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.note(key)
        return super().get(key, default)

    def pop(self, key, *default):
        self.note(key)
        return super().pop(key, *default)

    def __iter__(self):  # so that ** asks for each key
        return super().__iter__()

    def items(self):
        self.note(*self.keys())
        return super().items()

    def values(self):
        self.note(*self.keys())
        return super().values()


def noted(value, prefix, seen):
    return Noted(value, prefix, seen) if isinstance(value, dict) else value


yaml.SafeDumper.add_representer(Noted, lambda dumper, data: dumper.represent_dict(dict(dict.items(data))))


@pytest.fixture
def reads(monkeypatch):
    """The keys that a command reads after its checks, and the config itself under the key None."""
    seen, whole = set(), {}
    plain, check, build, get = config.plain, checks.check, config.build, DictConfig._get_impl
    silent = []

    def checked(cfg, **more):
        silent.append(True)
        try:
            check(cfg, **more)
        finally:
            silent.pop()
        whole["cfg"], whole["given"] = cfg, more["given"]

    def read(self, key, *args, **keywords):
        if not silent:
            seen.add(str(self._get_full_key(key)))
        return get(self, key, *args, **keywords)

    def below(node):
        prefix = str(node._get_full_key(None) or "")
        return f"{prefix}." if prefix else ""

    def planned(cfg):
        return plain(cfg) if silent else Noted(plain(cfg), below(cfg), seen)

    def built(node, **more):
        seen.update(f"{below(node)}{key}" for key in leaves(OmegaConf.to_container(node, resolve=True)))
        return build(node, **more)

    monkeypatch.setattr(DictConfig, "_get_impl", read)
    monkeypatch.setattr(config, "plain", planned)
    monkeypatch.setattr(config, "build", built)
    monkeypatch.setattr(checks, "check", checked)
    whole["seen"] = seen
    return whole


def leaves(values, prefix=""):
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def with_sources(cfg, seen):
    """The keys, and those that their values refer to."""
    found = set()
    waiting = list(seen)
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group) if group else cfg
        if isinstance(node, DictConfig) and name in node:
            text = OmegaConf.to_container(node, resolve=False).get(name)
            waiting += re.findall(r"\$\{(?:oc\.select:)?([\w.]+)\}", text) if isinstance(text, str) else []
    return found


def unread(command, whole):
    """The keys that nobody read and that would not be refused if they were given."""
    cfg = whole["cfg"]
    values = OmegaConf.to_container(cfg, resolve=True)
    seen = with_sources(cfg, whole["seen"])
    keys = [
        key
        for key in leaves(values)
        if key not in seen
        and not any(re.fullmatch(pattern, key) for pattern in ELSEWHERE.get(command, ()))
        and not isinstance(heard.value_at(values, key), dict)
        and "_target_" not in key
    ]
    return [key for key in keys if key not in heard.unheard(command, values, [key, *whole["given"]])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("adapter=lora", "sample=1", "sample.count=1", "sample.steps=1", "validation.every=1", "data.holdout=0.3"),
        ("expert=both", "init=scratch", "validation=off"),
    ],
)
def test_train_reads(words, tiny, pair, call, reads):
    """One step of training."""
    call("train.py", *tiny.train, f"weights={pair}", "batch_size=2", "steps=1", "run=r", *words)
    assert " ".join(unread("train", reads)) == ""


@pytest.mark.slow
def test_other_commands_read(tiny, pair, call, reads, tmp_path):
    """Captions, shards, latents, a sample and an export."""
    model = [word for word in tiny.train if word.startswith("model.")]
    shutil.copytree(tiny.footage, tmp_path / "footage")
    write_llava(tmp_path / "captioner")
    call("caption.py", "source=footage", "captioner=captioner", "recaption=all", "max_tokens=2", "precision=fp32")
    assert " ".join(unread("caption", reads)) == ""
    reads["seen"].clear()
    call("shard.py", f"source={tiny.footage}", "out=videos", "num_frames=9")
    assert " ".join(unread("shard", reads)) == ""
    reads["seen"].clear()
    call("encode.py", "shards=videos", "out=latents", f"weights={tiny.base}")
    assert " ".join(unread("encode", reads)) == ""
    reads["seen"].clear()
    call("sample.py", *model, f"weights={pair}", "prompt=a cat", "steps=1", "num_frames=5")
    assert " ".join(unread("sample", reads)) == ""
    reads["seen"].clear()
    call("export.py", *model, f"weights={pair}", "out=pipeline")
    assert " ".join(unread("export", reads)) == ""
