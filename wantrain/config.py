"""The door: the only room besides the verbs that knows Hydra and OmegaConf.

`app` turns a verb into a program (free text and paths are taken as typed; errors are one line), `build` makes the
objects that the command line composed, `locate` finds files that ship with the project. A stored config
is data: read and compared (training/run.py), never built from.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wantrain import geometry
from wantrain.data import Conditions, check_sets
from wantrain.models import Base, open_base, partial
from wantrain.training import replay
from wantrain.world import errors_to_exit_code

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

#: Keys whose values people type freely. Without quoting, Hydra reads a comma as a sweep and `(`, `=`, `!`, `~`,
#: Chinese or an emoji as a syntax error.
TEXT_KEYS = frozenset(
    (
        "prompt",
        "negative_prompt",
        "caption.prefix",
        "caption.default",
        "run",
        "tracker.project",
    )
)
PATH_KEYS = frozenset(
    ("source", "out", "replay", "shards", "data.shards", "data.cache", "weights", "runs", "prompts", "measure",
     "inspect", "image", "last_image", "video", "mask",
     "adapter.init", "experts.high_noise.init", "experts.low_noise.init", "noise.density.file",
     "lora.high_noise", "lora.low_noise", "lora.dense", "sample.prompts",
     "parts.high_noise", "parts.low_noise", "parts.dense", "parts.vae", "parts.text_encoder", "parts.tokenizer")
)  # fmt: skip


def quoted(argument: str) -> str:
    """One command-line override, with the value quoted for Hydra if its key holds free text or a path.

    A path keeps `null`, and a leading `~` becomes the home folder (the shell leaves it alone after `key=`).
    """
    match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", argument, flags=re.DOTALL)
    if match is None or match[2] not in TEXT_KEYS | PATH_KEYS:
        return argument
    prefix, key, value = match.groups()
    if key in PATH_KEYS:
        if value in {"", "null"}:
            return f"{prefix}{key}=null"
        value = os.path.expanduser(value)  # noqa: PTH111 - Path would also drop a trailing slash as typed
    # Inside double quotes Hydra unescapes \" (and backslashes before a quote); OmegaConf then reads ${ as a reference.
    value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    value = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], value)
    return f'{prefix}{key}="{value}"'


def app(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorator: make `verb(cfg)` the program whose config is conf/<name>.yaml.

    A ValueError (anything wrong with config or input) is one line on stderr and exit code 2; any other exception is
    a bug and shows its traceback.
    """

    def decorate(verb: Callable[[DictConfig], None]) -> Callable[[], None]:
        def job(cfg: DictConfig) -> None:
            with errors_to_exit_code():
                verb(cfg)

        def main() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let composition errors reach us instead of exiting
            sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
            with errors_to_exit_code():
                sys.argv[1:] = replay.arguments(sys.argv[1:], CONF)
                try:
                    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
                except (HydraException, OmegaConfBaseException) as error:
                    raise ValueError(_readable(error, name)) from error

        main.__doc__ = verb.__doc__
        return main

    return decorate


def _readable(error: Exception, name: str) -> str:
    """A composition error as one sentence, with the nearest key that exists."""
    text = " ".join(str(error).split())
    option = re.search(
        r"Could not find '([\w/]+)/([^']+)' Available options in '[^']+': (.*?) Config search path", text
    )
    if option is not None:
        choices = ", ".join(option[3].split())
        return f"{option[1]}={option[2]} is not there; choose one of {choices}"
    if bare := re.search(r"Error parsing override '([^'=]*)' missing EQUAL", text):
        return f"{bare[1]} is not a setting; write key=value"
    match = re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", text)
    override = re.search(r"Could not override '([^']+)'", text)
    if match is None:
        return re.sub(r" See https://hydra\S* for details", "", text)
    wrong = override[1] if override else match[1]
    known = _all_keys(compose(name))
    nearest = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{wrong} is not a key of {name}.py{hint} (python {name}.py --cfg job lists all)"


def compose(name: str, overrides: list[str] | None = None) -> DictConfig:
    """The config of a verb without running it; overrides as on the command line."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, [quoted(override) for override in overrides or []])


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
    if cfg.expert.name != "both" or len(cfg.model.experts) == 1:
        return {cfg.expert.name: cfg}
    found = {}
    for name in cfg.model.experts:
        own = cfg.copy()
        own.expert = cfg.expert[name]
        for key, value in cfg.experts[name].items():
            if value is None:
                continue
            place = _OWN[key]
            group, _, setting = place.rpartition(".")
            if setting not in (OmegaConf.select(own, group) if group else own):
                raise ValueError(f"experts.{name}.{key}={value}: there is no {place} to differ from")
            OmegaConf.update(own, place, value)
        found[name] = own
    return found


#: Settings that an expert of a pair may have for itself, and their places in the config.
_OWN = {
    "lr": "optimizer.lr",
    "muon_lr": "optimizer.muon_lr",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "init": "adapter.init",
    "ema": "ema",
}


def buckets(cfg: DictConfig, temporal_stride: int = 4) -> geometry.Buckets:
    """The sizes that encode.py brings clips to; ValueError for areas or aspects that give none."""
    areas = cfg.area if isinstance(cfg.area, ListConfig) else [cfg.area]
    if not all(_is_number(value) for value in [*areas, *cfg.aspects, cfg.upscale.limit]):
        raise ValueError(
            f"area={cfg.area}, aspects={cfg.aspects}, upscale.limit={cfg.upscale.limit} must be numbers, the first two "
            "also lists of numbers"
        )
    return geometry.Buckets(
        tuple(int(area) for area in areas),
        tuple(cfg.aspects),
        cfg.model.multiple,
        cfg.tokens,
        cfg.upscale.limit,
        temporal_stride,
    )


def conditions(cfg: DictConfig, **strides: Any) -> Conditions:
    """What encode.py stores of clips beside their latents; ValueError for what such a model cannot be told."""
    return Conditions(plain(cfg.condition), cfg.model.told_by, **strides)


def shards(cfg: DictConfig) -> list[str]:
    """Where the shards of a training lie: one place, or one of each set with data=mixed."""
    own = plain(cfg.data)
    return [own["shards"]] if "shards" in own else [one["shards"] for one in check_sets(own["sets"]).values()]


def has_base(cfg: DictConfig) -> bool:
    """True if the command line names a base model, or parts of one."""
    return cfg.weights is not None or any(path is not None for path in cfg.parts.values())


def needed_path(cfg: DictConfig, key: str) -> Path:
    """The path under `key`; ValueError if it was left out."""
    if cfg[key] is None:
        raise ValueError(f"give {key}=PATH")
    return Path(cfg[key])


def recipe() -> str | None:
    """The recipe that was chosen on the command line; None if there was none."""
    return HydraConfig.get().runtime.choices.get("recipe")


def command() -> list[str]:
    """What was typed, as Hydra was given it; without what belongs to this start alone."""
    words = HydraConfig.get().overrides.task
    return [word for word in words if word.split("=", 1)[0] not in {"replay", "stop_after", "dry_run"}]


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


def check(cfg: DictConfig, *, processes: int = 1) -> None:
    """Everything about a composed config that can be judged before work starts; all problems, raised once.

    Each problem names its key and the mend. Keys that a verb does not have are not judged.
    """
    problems: list[str] = []

    def judge(test: Callable[[], object]) -> None:
        try:
            test()
        except ValueError as error:
            problems.append(str(error))

    if "aspects" in cfg:
        judge(lambda: buckets(cfg))
    if "condition" in cfg:
        judge(lambda: conditions(cfg))
    if "lengths" in cfg:
        judge(lambda: _check_lengths(cfg))
    judge(lambda: plain(cfg))  # missing values (???) and broken references
    if "num_frames" in cfg:
        judge(lambda: _check_num_frames(cfg, "num_frames"))
    if "model" in cfg:
        judge(lambda: _check_num_frames(cfg, "model.num_frames"))
    if cfg.get("height") is not None or cfg.get("width") is not None:
        judge(lambda: _check_picture(cfg))
    if "expert" in cfg:
        judge(lambda: _check_experts(cfg))
        judge(lambda: _check_batch(cfg, processes))
        judge(lambda: _check_length(cfg))
        problems.extend(_adapter_problems(cfg))
        judge(lambda: shards(cfg))
        if cfg.sample.prompts is not None and cfg.model.told_by == "channels":
            problems.append(
                f"sample.prompts={cfg.sample.prompts}: model={cfg.model.name} makes videos of what is known, so its "
                "previews go on from held-out clips; leave it out"
            )
        if "condition" in cfg.data:
            judge(lambda: Conditions(plain(cfg.data.condition), cfg.data.told_by, key="data.condition"))
        if cfg.adapter.name == "partial":
            part = plain(cfg.adapter)
            judge(lambda: partial.check(part["layers"], part["tags"], cfg.model.transformer.num_layers))
    if "guidance" in cfg and not isinstance(cfg.guidance, DictConfig):
        first = next(iter(cfg.model.experts))
        problems.append(f"guidance={cfg.guidance} must be given per expert: guidance.{first}=...")
    for key, allowed in _CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in allowed:
            problems.append(f"{key}={value} is unknown; choose one of {', '.join(allowed)}")
    for key in (*_WHOLE, *_POSITIVE):
        value = OmegaConf.select(cfg, key)
        if value in _WORDS.get(key, ()) or (key == "area" and isinstance(value, ListConfig)):
            continue
        if value is not None and not _is_number(value, whole=key in _WHOLE):
            words = f", or one of {', '.join(_WORDS[key])}" if key in _WORDS else ""
            problems.append(f"{key}={value} must be a {'whole ' if key in _WHOLE else ''}number{words}")
        elif value is not None and not value > 0:
            problems.append(f"{key}={value} must be above 0")
    for key in _SWITCHES:
        value = OmegaConf.select(cfg, key)
        if value is not None and not isinstance(value, bool):
            problems.append(f"{key}={value} must be true or false")
    for key in ("every", "keep", "keep_best", "background", "on_failure"):
        if "checkpoint" in cfg and cfg.checkpoint[key] is None:
            problems.append(f"checkpoint.{key}=null says nothing; leave it out for its default")
    if problems:
        many = f"{len(problems)} problems:\n  - " if len(problems) > 1 else ""
        raise ValueError(many + "\n  - ".join(problems))


_CHOICES = {
    "precision": ("fp32", "bf16"),
    "dtype": ("fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda"),
    "solver": ("unipc", "dpm++", "euler"),
    "caption.missing": ("error", "skip", "empty"),
    "clips": ("all", "first", "middle", "random"),
    "report": ("page", "decode", "none"),
    "init": ("base", "widen", "scratch"),
    "check_expert": ("warn", "stop", "off"),
    "experts.idle": ("gpu", "cpu"),
    "idle": ("gpu", "cpu", "disk"),
    "offload": ("none", "blocks"),
    "sample.idle": ("gpu", "cpu", "disk"),
    "sample.offload": ("none", "blocks"),
    "checkpoint.on_failure": ("stop", "continue"),
    "layout": ("diffusers", "official", "comfyui"),
    "lora.dialect": ("comfyui", "diffusers", "kohya"),
    "adapter.targets": ("attention", "attention+ffn", "all"),
    "scenes": ("off", "split"),
    "static": ("report", "drop"),
    "duplicates": ("report", "drop"),
}
#: Keys that hold a number or one of these words.
_WORDS = {"fps": ("native", "resample")}
_WHOLE = (
    "tripwires.patience", "steps", "stop_after", "batch_size", "accumulate", "count", "shard_mb", "area", "tile",
    "stride", "tokens", "shard_clips", "decode.workers",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every",
    "validation.every", "validation.clips", "validation.points", "validation.together",
    "validation.stop_after", "adapter.rank", "sample.steps", "sample.count",
)  # fmt: skip
_SWITCHES = ("check", "decode.retry", "stretch", "checkpoint.keep_best", "checkpoint.background")
_POSITIVE = (
    "decode.timeout",
    "patience",
    "tripwires.spike",
    "tripwires.refuse",
    "tripwires.hang",
    "epochs",
    "clip",
    "fps",
    "shift",
    "adapter.alpha",
    "optimizer.lr",
    "data.cache_gb",
)


def _is_number(value: object, *, whole: bool = False) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _check_num_frames(cfg: DictConfig, key: str) -> None:
    value = OmegaConf.select(cfg, key)
    if not _is_number(value, whole=True):
        raise ValueError(f"{key}={value} must be a whole number")
    geometry.check_num_frames(value, key=key)


def _check_lengths(cfg: DictConfig) -> None:
    for length in cfg.lengths:
        if not _is_number(length, whole=True):
            raise ValueError(f"lengths={cfg.lengths} must be whole numbers of frames")
        geometry.check_num_frames(length, key="lengths")


def _check_picture(cfg: DictConfig) -> None:
    if cfg.height is None or cfg.width is None:
        raise ValueError("height and width go together; give both, or neither for the model's own size")
    if not (_is_number(cfg.height, whole=True) and _is_number(cfg.width, whole=True)):
        raise ValueError(f"height={cfg.height}, width={cfg.width} must be whole numbers of pixels")
    geometry.check_size(cfg.height, cfg.width, cfg.model.multiple, key="height, width")


def _check_experts(cfg: DictConfig) -> None:
    for own in experts(cfg).values():
        _check_expert(own)
        _check_optimizer(own.optimizer)
        build(own.schedule)
        build(own.loss)  # its own words on a noise law that cannot be


def _check_expert(cfg: DictConfig) -> None:
    name, known = cfg.expert.name, list(cfg.model.experts)
    if cfg.ema is not None and not (_is_number(cfg.ema, whole=False) and 0 < cfg.ema < 1):
        raise ValueError(f"ema={cfg.ema} must lie between 0 and 1, e.g. 0.999; null keeps no average")
    further = cfg.model.transformer.in_channels - cfg.model.transformer.out_channels
    if cfg.init == "widen" and name in known and (not further or cfg.adapter.name != "none"):
        raise ValueError(
            f"init=widen with model={cfg.model.name} (which has {further} further input channels) and "
            f"adapter={cfg.adapter.name}: it is for a model that is told by further channels, all of whose weights are "
            "trained; give init=base, or adapter=none"
        )
    if cfg.init == "scratch" and cfg.adapter.name != "none":
        raise ValueError(
            f"init=scratch with adapter={cfg.adapter.name}: an adapter changes a trained model; give init=base"
        )
    given = [part for part, path in cfg.parts.items() if path is not None]
    if cfg.weights is None and name != "vae" and not {"vae", "text_encoder"} <= set(given):
        raise ValueError(
            "weights=null: VAE and text encoder must come from somewhere; give a model's folder, or parts.vae= and "
            "parts.text_encoder="
        )
    if (name == "vae") != cfg.data.get("_target_", "").endswith("PixelData"):
        raise ValueError(
            f"expert={name} with the wrong data=: expert=vae and data=pixels go together (recipe=wan_tiny_vae)"
        )
    if name == "vae":
        if cfg.expert.trains not in {"all", "decoder"}:
            raise ValueError(f"expert.trains={cfg.expert.trains} is unknown; choose one of all, decoder")
        if cfg.weights is None and cfg.parts.vae is None and "vae" not in cfg.model:
            raise ValueError("expert=vae needs weights= to start from, or model.vae as in recipe=wan_tiny_vae_images")
    elif name not in known:  # also both, where the model is one transformer
        raise ValueError(
            f"expert={name}: model={cfg.model.name} has {', '.join(known)}; "
            f"use {' or '.join(f'expert={other}' for other in known)}, or another model="
        )


def _check_optimizer(node: DictConfig) -> None:
    """Raise ValueError if the optimizer's class cannot be imported, or has not the keywords that are given."""
    name, given = node._target_, [str(key) for key in node if key != "_target_"]
    try:
        takes = inspect.signature(hydra.utils.get_object(name)).parameters
    except Exception as error:  # whatever importing somebody's module raises
        raise ValueError(f"optimizer._target_={name} is no class that can be imported: {error}") from error
    known = [key for key in list(takes)[1:] if takes[key].kind not in {inspect.Parameter.VAR_KEYWORD}]
    if len(known) == len(takes) - 1 and (wrong := [key for key in given if key not in known]):
        raise ValueError(f"optimizer.{wrong[0]} is no keyword of {name}; it takes {', '.join(known)}")
    if missing := [key for key in known if takes[key].default is inspect.Parameter.empty and key not in given]:
        raise ValueError(f"{name} needs optimizer.{missing[0]}; give +optimizer.{missing[0]}=VALUE")


def _adapter_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the settings of the chosen adapter, numbers and choices apart, which all groups share."""
    settings, problems = plain(cfg.adapter), []
    if settings["name"] != "none" and cfg.expert.name == "vae":
        problems.append(f"adapter={settings['name']} is for transformers; with expert=vae give adapter=none")
    if not isinstance(settings.get("rank_stabilized", False), bool):
        problems.append(f"adapter.rank_stabilized={settings['rank_stabilized']} must be true or false")
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = settings.get(key)
        if pattern is None:
            continue
        if not isinstance(pattern, dict):
            problems.append(f"adapter.{key}={pattern} must give numbers to parts of layer names: {{ffn: 8}}")
            continue
        wrong = [part for part, value in pattern.items() if not (_is_number(value, whole=whole) and value > 0)]
        problems += [
            f"adapter.{key}: {part}: {pattern[part]} must be a {'whole ' if whole else ''}number above 0"
            for part in wrong
        ]
        if settings["init"] is not None:
            problems.append(f"adapter.{key} and adapter.init: the file has its own; leave out one of them")
    return problems


def _check_batch(cfg: DictConfig, processes: int) -> None:
    if not (_is_number(cfg.accumulate, whole=True) and _is_number(cfg.batch_size, whole=True)):
        return  # said with the other numbers
    parts = cfg.accumulate * processes
    if cfg.accumulate >= 1 and cfg.batch_size % parts:
        below = max(1, cfg.batch_size // parts) * parts
        raise ValueError(
            f"batch_size={cfg.batch_size} must divide by accumulate x processes = {cfg.accumulate} x {processes}; "
            f"the nearest are {below} and {below + parts}"
        )


def _check_length(cfg: DictConfig) -> None:
    if cfg.steps is not None and cfg.epochs is not None:
        raise ValueError(f"steps={cfg.steps} and epochs={cfg.epochs} both set the length; give one of them")


def device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` (this process's own) as a device; ValueError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device=cuda, but no GPU is visible; use device=cpu or device=auto")
    if available and name != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # each process its own
        return torch.device("cuda")
    return torch.device("cpu")


def dtype(name: str) -> torch.dtype:
    """`fp32`, `bf16` or `fp16` as a dtype."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
