"""The conf/ folder: every option composes, says exactly what its constructor takes, and no fact stands twice."""

import importlib.util
import inspect
import itertools
import re

import hydra.utils
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from wantrain import checks, config, flow
from wantrain.config import CONF, compose
from wantrain.models.formats.pipeline import PARTS
from wantrain.settings import schema

COMMANDS = ("caption", "shard", "encode", "train", "sample", "export", "doctor")
OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
FILES = sorted(CONF.rglob("*.yaml"))

#: What is a model's own and may stand in conf/model alone; elsewhere it is a reference.
FACTS = {"boundary", "shift", "fps", "multiple", "negative_prompt", "guidance", "experts", "in_channels", "text_dim"}


def nodes(value, path=""):
    """Every (dotted key, value) of a raw file, inner dicts included."""
    for key, inner in value.items():
        name = f"{path}.{key}" if path else str(key)
        yield name, inner
        if isinstance(inner, dict):
            yield from nodes(inner, name)


def raw(file):
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


@pytest.fixture(scope="module")
def composed():
    """Each command's config as it is with nothing given."""
    return {command: compose(command) for command in COMMANDS}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_compose(option):
    """Every option composes, and every reference in it resolves."""
    group, name = option.split("/")
    by_card = group == "recipe" and name.startswith(("lora_", "full_"))  # for the models of 5B and 14B
    model = ["model=ti2v_5b", "expert=dense"] if "_5b_" in name else ["model=t2v_a14b"]
    cfg = compose("train", [f"{group}={name}", *(model if by_card else [])])
    values = config.plain(cfg)
    if group == "recipe":
        checks.check(cfg)
    elif group == "model":
        assert values["model"]["name"] == name
    elif group in {"expert", "adapter", "tracker"}:
        assert values[group]["name"] == name
    else:
        assert (
            values[group].items()
            >= {key: value for key, value in raw(CONF / f"{option}.yaml").items() if "${" not in str(value)}.items()
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONF).as_posix())
def test_option_keywords(file):
    """An option names a constructor and exactly its keywords."""
    values = raw(file)
    for name, node in [("", values), *nodes(values)]:
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        target = hydra.utils.get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        given = node.keys() - {"_target_"}
        if file.parent.name == "optimizer":
            given |= {"params"}  # what an optimizer is over is not a setting
        if node["_target_"].startswith("torch."):  # torch's own constructors have more than we show
            assert given <= parameters.keys(), name
            continue
        assert not any(p.kind in {p.VAR_KEYWORD, p.VAR_POSITIONAL} for p in parameters.values()), node["_target_"]
        assert not {"cfg", "config"} & parameters.keys()
        assert given <= parameters.keys(), f"{name}: {given - parameters.keys()} is no keyword of {node['_target_']}"
        if name:  # a network inside a model: what is left out is a constant of every published one
            required = {key for key, p in parameters.items() if p.default is p.empty}
            assert required <= given
        else:
            assert given == parameters.keys(), f"{parameters.keys() - given} cannot be set from the command line"


@pytest.mark.parametrize("option", [option for option in OPTIONS if "_target_" in raw(CONF / f"{option}.yaml")])
def test_option_values(option):
    """An option is built with the values it names."""
    group, name = option.split("/")
    cfg = compose("train", [f"{group}={name}"])
    if group == "data":
        with pytest.raises(ValueError, match="nowhere holds no shards"):  # it has taken all of its keywords by then
            lacking = {
                "mixed": {"sets": {"a": {"shards": "nowhere"}}},
                "pairs": {"pairs": "p.csv", "shards": "nowhere"},
            }
            config.build(cfg.data, **lacking.get(name, {"shards": "nowhere"}))
    elif option == "optimizer/adamw_8bit" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    elif group == "optimizer":
        optimizer = config.build(cfg.optimizer, _partial_=True)([{"params": [torch.nn.Parameter(torch.ones(2))]}])
        assert optimizer.defaults.items() >= {k: v for k, v in config.plain(cfg.optimizer).items() if k == "lr"}.items()
    else:
        built = config.build(cfg[group])
        held = vars(built) | vars(vars(built).get("window", object.__new__(type("none", (), {}))))
        wanted = {key: value for key, value in config.plain(cfg[group]).items() if key != "_target_"}
        assert held.items() >= wanted.items()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONF).as_posix())
def test_first_line(file):
    """The first line of a config file says when to choose it."""
    first = file.read_text(encoding="utf-8").splitlines()
    comment = first[1] if first[0] == "# @package _global_" else first[0]
    assert comment.startswith("# ") and len(comment.split()) >= 4
    if file.parent == CONF:
        assert f"{file.stem}.py" in comment
    elif file.parent.name not in {"recipe", "loss"}:
        assert comment.startswith(("# Choose it", "# Only for"))


def test_model_facts():
    """A model's facts are in its own file only."""
    for file in FILES:
        if file.parent.name in {"model", "noise"}:  # a noise distribution may bring another trainer's own shift
            continue
        for key, value in nodes(raw(file)):
            own = key.endswith("offload.experts") or key.startswith(
                "experts."
            )  # a recipe's shift per expert is a choice
            if key.split(".")[-1] in FACTS and not isinstance(value, dict) and not own:
                assert value is None or str(value).startswith("${"), f"{file}: {key}={value} repeats a model's fact"


@pytest.mark.parametrize("model", [path.stem for path in (CONF / "model").glob("*.yaml")])
def test_expert_windows(model):
    """The experts of a model cover the whole noise range once."""
    facts = compose("train", [f"model={model}"]).model
    assert all(facts.guidance[name] > 0 for name in facts.experts)
    windows = []
    for name in facts.experts:
        expert = compose("train", [f"model={model}", f"expert={name}"]).expert
        assert expert.part == PARTS[name] and expert.name == name
        windows.append((expert.low, expert.high))
    windows.sort()
    assert windows[0][0] == 0.0 and windows[-1][1] == 1.0
    assert all(below[1] == above[0] for below, above in itertools.pairwise(windows))
    masses = [flow.window_mass(flow.NoiseWindow(*w), density="uniform", shift=facts.shift) for w in windows]
    assert sum(masses) == pytest.approx(1.0)


def test_schema_covers_configs(composed):
    """Every key of a command's file has a kind in the schema, and every kind a key in some composition."""
    for command, cfg in composed.items():
        kinds = schema.COMMANDS[command]
        keys = [
            key
            for key in config._all_keys(cfg)
            if key in kinds or not isinstance(OmegaConf.select(cfg, key), DictConfig)
        ]
        below = [
            key
            for key in keys
            if any(
                key.startswith(f"{node}.") for node in ("model.transformer", "loss", "data", "optimizer", "schedule")
            )
        ]
        assert [key for key in keys if key not in kinds and key not in below] == []
        groups = raw(CONF / f"{command}.yaml")
        own = [key for key in kinds if (group := key.split(".")[0]) in groups and not (CONF / group).is_dir()]
        assert [key for key in own if key not in keys] == []


def test_command_configs(composed):
    """Every command has its own config, and Hydra writes no files of its own."""
    for command, cfg in composed.items():
        text = (CONF / f"{command}.yaml").read_text()
        assert "output_subdir: null" in text and "chdir: false" in text and "run: {dir: .}" in text
        assert isinstance(cfg, DictConfig) and "hydra" not in cfg
        assert re.search(rf"python {command}\.py|train\.py", text.splitlines()[0])
        assert (config.ROOT / f"{command}.py").is_file()


@pytest.mark.parametrize("wrong", ["optimizer.lrr=1", "model.boundry=0.9", "checkpoint.evry=1", "accumulation=2"])
def test_misspelt_key(wrong):
    """The error for a misspelt key names the nearest key."""
    with pytest.raises(Exception, match=r"Could not override|not in struct") as caught:
        compose("train", [wrong])
    key = wrong.split("=")[0]
    nearest = {"optimizer.lrr": "optimizer.lr", "model.boundry": "model.boundary", "checkpoint.evry": "checkpoint.every",
               "accumulation": "accumulate"}[key]  # fmt: skip
    told = config._readable(caught.value, "train")
    assert told.startswith(f"{key} is not a key of train.py; did you mean {nearest}")


def test_tiny_base(tmp_path, monkeypatch):
    """The tiny base ships with the project and is found from any working folder."""
    monkeypatch.chdir(tmp_path)
    base = config.locate(compose("train").weights)
    assert base == config.ROOT / "assets" / "wan-tiny"
    assert (base / "text_encoder" / "config.json").is_file() and (base / "tokenizer" / "tokenizer.json").is_file()
