"""The entry point of every command: the only module that knows Hydra; OmegaConf is keys to it, the commands and
checks/ alone.

`app` turns a command into a program (free text and paths are taken as typed; errors are one line), `build` makes the
objects that the command line composed, `locate` finds files that ship with the project. A stored config
is data: read and compared (runs/folder.py), never built from.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wantrain import geometry
from wantrain.data import ConditioningInputs, check_sets
from wantrain.models import Base, open_base
from wantrain.runs import replay
from wantrain.settings import settings_file, words
from wantrain.settings.schema import OF_AN_EXPERT
from wantrain.util import distributed
from wantrain.util.console import errors_to_exit_code, say
from wantrain.util.renamed import refuse_old_keys
from wantrain.util.shipped import ROOT

if TYPE_CHECKING:  # sample.py and export.py import nothing of training
    from wantrain.training.batching import Batching
    from wantrain.training.options import ExpertOptions
    from wantrain.training.planning.forecast import Forecast

CONF = ROOT / "conf"
#: The settings file of this start, and its words as Hydra is given them.
_FILE: ContextVar[settings_file.FromFile | None] = ContextVar("settings file", default=None)


def app(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorator: make `command(cfg)` the program whose config is conf/<name>.yaml.

    With -m it runs once for each combination of the values that are swept, one after the other, each under a run name
    of its own. A ValueError (anything wrong with config or input) is one line on stderr and exit code 2; any other
    exception is a bug and shows its traceback.
    """

    def decorate(command: Callable[[DictConfig], None]) -> Callable[[], None]:
        def job(cfg: DictConfig) -> None:
            with errors_to_exit_code():
                if (file := _FILE.get()) is not None:
                    say(f"settings of {file.path}: {' '.join(file.words)}")
                _begin_swept_run(cfg, name)
                command(cfg)

        def main() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let composition errors reach us instead of exiting
            sweep = words.is_sweep(sys.argv[1:])
            with errors_to_exit_code(), tempfile.TemporaryDirectory() as own_files:
                typed, file = settings_file.taken_out(sys.argv[1:], name)
                sys.argv[1:] = [words.quoted(word, sweep=sweep) for word in typed]
                if file is not None:
                    file = file._replace(words=[words.quoted(word, sweep=sweep) for word in file.words])
                    sys.argv[1:] = [*file.words, *sys.argv[1:]]
                _FILE.set(file)
                refuse_old_keys(sys.argv[1:])
                words.refuse_choices(sys.argv[1:], _choices(), sweep=sweep)
                sys.argv[1:] = replay.arguments(sys.argv[1:], CONF)
                if sweep:  # Hydra wants -m before or after all settings, and writes a file about the sweep
                    settings = [word for word in sys.argv[1:] if not words.is_sweep([word])]
                    sys.argv[1:] = ["-m", *settings, f"hydra.sweep.dir={own_files}"]
                try:
                    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
                except (HydraException, OmegaConfBaseException) as error:
                    raise ValueError(_readable(error, name)) from error

        main.__doc__ = command.__doc__
        return main

    return decorate


def _begin_swept_run(cfg: DictConfig, name: str) -> None:
    """Say which run of a sweep begins, and give a training its own name by what is swept. Nothing without a sweep."""
    about = HydraConfig.get()
    if about.mode != RunMode.MULTIRUN:
        return
    keys = [each.key_or_group for each in _overrides(sys.argv[1:]) if each.is_sweep_override()]
    values = {each.key_or_group: str(each.value()) for each in _overrides(about.overrides.task)}
    swept = {key: values[key] for key in keys}
    if name == "train" and swept and "run" not in swept:
        cfg.run = words.swept_name(cfg.run, swept, about.job.num)
    say(f"sweep, number {about.job.num}: {', '.join(f'{key}={value}' for key, value in swept.items())}")


def _overrides(arguments: Iterable[str]) -> list[Override]:
    """The settings among a command line's words, as Hydra reads them."""
    settings = [word for word in arguments if "=" in word and not word.startswith("-")]
    return OverridesParser.create().parse_overrides(settings)


def given(cfg: DictConfig, *, every: bool = False) -> frozenset[str]:
    """The keys that this start sets on the command line, in a settings file or in a recipe, and the groups whose option
    was chosen; but for what a replay takes from the run that it repeats. Unless `every` is asked for, also but for
    values that ask for nothing (null, false, off, none), and for a settings file where words are typed beside it: they
    may leave settings of the file without effect.
    """
    task, file = list(HydraConfig.get().overrides.task), _FILE.get()
    if file is not None and not every and len(task) > len(file.words):
        task = [word for word in task if word not in file.words]
    if cfg.get("replay") is not None:
        recorded = set(replay.read_starts(Path(cfg.replay))[0]["command"])
        task = [word for word in task if word not in recorded]
    recipe = _recipe_keys(every=every)
    if cfg.get("expert") and cfg.expert.name != "both":  # a pair's recipe serves one of its experts too
        recipe = {key for key in recipe if not key.startswith("experts.") or key.split(".")[1] == cfg.expert.name}
    return keys_of(task, every=every) | recipe


def keys_of(arguments: Iterable[str], *, every: bool = False) -> frozenset[str]:
    """The keys that words of a command line set; unless `every`, to a value that asks for something."""
    keys: set[str] = set()
    for each in _overrides(arguments):
        if not each.is_delete():
            keys |= _set_keys(each.value(), each.key_or_group, every=every)
    return frozenset(keys)


def _set_keys(value: Any, key: str, *, every: bool) -> set[str]:
    """The keys of a nested value; unless `every`, those that ask for something."""
    if isinstance(value, Mapping) and "_target_" not in value:
        return {found for name, inner in value.items() for found in _set_keys(inner, f"{key}.{name}", every=every)}
    return {key} if every or not (value is None or value is False or value in ("off", "none")) else set()


def _recipe_keys(*, every: bool) -> set[str]:
    """The keys that the chosen recipes set, and those that they are built on."""
    keys: set[str] = set()
    folders = [Path(each.path) for each in HydraConfig.get().runtime.config_sources if each.schema == "file"]
    names = recipes()
    for name in names:
        for file in filter(Path.is_file, (folder / "recipe" / f"{name}.yaml" for folder in folders)):
            values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            assert isinstance(values, dict)
            names += [base for base in values.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
            for key, value in values.items():
                keys |= _set_keys(value, str(key), every=every)
    return keys


def _readable(error: Exception, name: str) -> str:
    """A composition error as one sentence, with the nearest key that exists."""
    text = " ".join(str(error).split())
    option = re.search(
        r"Could not find '([\w/]+)/([^']+)' Available options in '[^']+': (.*?) Config search path", text
    )
    if option is not None:
        choices = ", ".join(option[3].split())
        return f"{option[1]}={option[2]} is not there; choose one of {choices}"
    if missing := re.search(r"Could not load '(\w+)/([^']+)'", text):
        return f"{missing[1]}={missing[2]} is not there; choose of {', '.join(_choices().get(missing[1], []))}"
    if bare := re.search(r"Error parsing override '([^'=]*)' missing EQUAL", text):
        return f"{bare[1]} is not a setting; write key=value"
    if merged := re.search(r"Cannot merge DictConfig with ListConfig.*full_key: (\S+)", text):
        return (
            f"{merged[1]} takes a list, not a mapping" if " object_type=list" in text else f"{merged[1]} takes no list"
        )
    match = re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", text)
    override = re.search(r"Could not override '([^']+)'", text)
    if match is None:
        return re.sub(r" See https://hydra\S* for details", "", text)
    full = re.search(r"full_key: (\S+)", text)
    wrong = full[1] if full else override[1] if override else match[1]
    keys = _all_keys(compose(name))
    if wrong in keys:  # a mapping
        inner = ", ".join(key for key in keys if key.startswith(f"{wrong}."))
        return f"{wrong}={{...}} sets a key that there is not; there are {inner}"
    nearest = difflib.get_close_matches(wrong, [key for key in keys if "_target_" not in key], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{wrong} is not a key of {name}.py{hint} (python {name}.py --cfg job lists all)"


def _choices() -> dict[str, list[str]]:
    """The groups of options that ship with the project, and their options."""
    groups = (path for path in CONF.iterdir() if path.is_dir())
    return {group.name: sorted(option.stem for option in group.glob("*.yaml")) for group in groups}


def compose(name: str, overrides: list[str] | None = None) -> DictConfig:
    """The config of a command without running it; overrides as on the command line."""
    GlobalHydra.instance().clear()
    given = words.expanded(overrides or [])
    words.refuse_choices(given, _choices())
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, [words.quoted(word) for word in given])


def _all_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key, node in cfg.items_ex(resolve=False):
        keys.append(prefix + str(key))
        if isinstance(node, DictConfig):
            keys.extend(_all_keys(node, f"{prefix + str(key)}."))
    return keys


def build(node: DictConfig, **more: Any) -> Any:
    """The object that a composed node names by `_target_`, with `more` keywords; plain lists and dicts inside."""
    try:
        return hydra.utils.instantiate(node, **more, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # the constructor's own words, without Hydra's around them
        raise ValueError(" ".join(str(error).split())) from error


def named(target: str) -> Any:
    """The class or function that a `_target_` names; whatever error importing it raises."""
    return pkgutil.resolve_name(target)


def base(cfg: DictConfig, wanted: Iterable[str]) -> Base:
    """The base model that weights=, parts= and revision= name; of a hub repository the `wanted` parts are fetched."""
    parts, like = plain(cfg.parts), plain(cfg.model.transformer)
    return open_base(cfg.weights, parts, wanted=wanted, revision=cfg.revision, like=like, locate=locate)


def network(cfg: DictConfig) -> Callable[[], Any]:
    """What builds, with random values, the module that an expert's config trains; ValueError when it is called for a
    model whose config has no such part.
    """
    part = "vae" if cfg.expert.name == "vae" else "transformer"

    def make() -> Any:
        if part not in cfg.model:
            raise ValueError(f"model={cfg.model.name} describes no {part} to start from scratch; give weights=FOLDER")
        return build(cfg.model[part])

    return make


def experts(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config of each expert in training, as if it were trained alone: one, or with expert=both two, each with what
    `experts.NAME` says differs for it. ValueError for a setting that the chosen optimizer or adapter has not.
    """
    pair = cfg.expert.name == "both" and len(cfg.model.experts) > 1
    found = {}
    for name in cfg.model.experts if pair else [cfg.expert.name]:
        own = cfg.copy()
        if pair:
            own.expert = cfg.expert[name]
        for key, value in cfg.experts.get(name, {}).items():
            if value is None:
                continue
            place = OF_AN_EXPERT[key]
            group, _, setting = place.rpartition(".")
            if setting not in (OmegaConf.select(own, group) if group else own):
                raise ValueError(f"experts.{name}.{key}={value}: there is no {place} to differ from")
            OmegaConf.update(own, place, value, merge=False)  # an object stands in place of another whole
        found[name] = own
    return found


def expert_options(cfg: DictConfig) -> dict[str, ExpertOptions]:
    """The experts in training, each with what its own config builds. ValueError as `experts`."""
    from wantrain.training.options import ExpertOptions
    from wantrain.training.preserving import preserving

    return {
        name: ExpertOptions(
            name,
            plain(own),
            network(own),
            preserving(build(own.loss), **plain(own.preserve)),
            build(own.optimizer, _partial_=True),
            build(own.schedule),
        )
        for name, own in experts(cfg).items()
    }


def forecast(cfg: DictConfig) -> Forecast:
    """What the run of this config will be, in as many processes as were launched."""
    from wantrain.training.alternation import ExpertAlternation
    from wantrain.training.planning.forecast import Forecast

    values, options = settings(cfg), expert_options(cfg)
    alternation = ExpertAlternation.of(list(options), values["experts"]["share"])
    return Forecast.of(values, options, alternation, batching(cfg, distributed.world_size()), dtype(cfg.precision))


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The whole config as plain data, with the recipe that was chosen."""
    return {**plain(cfg), "recipe": ",".join(recipes()) or None}


def buckets(cfg: DictConfig, temporal_stride: int = 4) -> geometry.Buckets:
    """The sizes that encode.py brings clips to; ValueError for areas or aspects that give none."""
    areas = cfg.area if isinstance(cfg.area, ListConfig) else [cfg.area]
    return geometry.Buckets(
        tuple(int(area) for area in areas),
        tuple(cfg.aspects),
        cfg.model.multiple,
        cfg.tokens,
        cfg.upscale.limit,
        temporal_stride,
    )


def conditioning_inputs(cfg: DictConfig, **strides: Any) -> ConditioningInputs:
    """What encode.py stores beside a clip's latents; ValueError for mask types that the model cannot take."""
    return ConditioningInputs(plain(cfg.mask_types), cfg.model.conditioning, **strides)


def video_size(cfg: DictConfig) -> geometry.Bucket:
    """The size of sample.py's videos: height= and width=, or the largest square within the model's area."""
    size = (cfg.height, cfg.width) if cfg.height else geometry.sizes(cfg.model.area, cfg.model.multiple, [1.0])[0]
    return geometry.Bucket(cfg.num_frames, *size)


def shards(cfg: DictConfig) -> list[str]:
    """Where the shards of a training lie: one place, or one of each set with data=mixed."""
    own = plain(cfg.data)
    return [own["shards"]] if "shards" in own else [one["shards"] for one in check_sets(own["sets"]).values()]


def batching(cfg: DictConfig, processes: int) -> Batching:
    """How a step's samples are shared out over backward passes and `processes`; ValueError if they cannot be."""
    from wantrain.training.batching import Batching

    return Batching.of_settings(cfg, processes)


def has_base(cfg: DictConfig) -> bool:
    """True if the command line names a base model, or parts of one."""
    return cfg.weights is not None or any(path is not None for path in cfg.parts.values())


def needed_path(cfg: DictConfig, key: str) -> Path:
    """The path under `key`; ValueError if it was left out."""
    if cfg[key] is None:
        raise ValueError(f"give {key}=PATH")
    return Path(cfg[key])


def recipes() -> list[str]:
    """The recipes that were chosen on the command line: none, one, or with recipe=[ONE,OTHER] several."""
    chosen = HydraConfig.get().runtime.choices.get("recipe") if HydraConfig.initialized() else None
    return re.findall(r"[^\[\],\s]+", str(chosen)) if chosen is not None else []


def command() -> list[str]:
    """What was typed, as Hydra was given it; without what belongs to this start alone."""
    typed = HydraConfig.get().overrides.task
    return [word for word in typed if word.split("=", 1)[0] not in {"replay", "stop_after", "dry_run"}]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts and values, every reference resolved."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def to_yaml(cfg: DictConfig) -> str:
    """The resolved config as text."""
    return OmegaConf.to_yaml(cfg, resolve=True)


def locate(path: str | Path) -> Path:
    """A path as the user sees it; a relative one that is not below the current folder may ship with the project."""
    path = Path(path).expanduser()
    if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
        return ROOT / path
    return path


def dtype(name: str) -> torch.dtype:
    """`fp32`, `bf16` or `fp16` as a dtype."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
