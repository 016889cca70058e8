"""Judging a composed config before work starts: every problem, with its key and its fix, at once.

What can be judged only with weights or data in hand is judged where they are opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from wantrain import config, geometry
from wantrain.checks import schedules, updates
from wantrain.data import ConditioningInputs, PairData
from wantrain.data.upload import check_address
from wantrain.losses import LossFunction, Preference
from wantrain.models import attention, partial
from wantrain.models.activation_policy import DTYPES, ActivationPolicy
from wantrain.models.offload import check_swap
from wantrain.runs.folder import check_name
from wantrain.sampling.conditioning import check_files, files_from
from wantrain.settings import heard, walk
from wantrain.settings.kinds import Count, Positive, described, fits, shown
from wantrain.settings.schema import COMMANDS
from wantrain.util import distributed

#: By command, the key of the folder that it writes into, and what to do where an address is wanted.
ON_DISK = {
    "caption": ("source", "captions are written beside the files: copy them here, and give their folder"),
    "shard": ("out", "copy the finished folder to the address, with its index-*.jsonl"),
    "encode": ("out", "upload= copies the finished folder to an address"),
}


def check(cfg: DictConfig, *, given: Iterable[str] = (), processes: int = 1) -> None:
    """Everything about a composed config that can be judged before work starts; all problems, raised once.

    First the kind of every value (settings/schema.py), then what the values mean together, then the keys `given` that
    have no effect (settings/heard.py). Each problem names its key and the fix.
    """
    command = _command_of(cfg)
    _raise(_wrong_groups(cfg, command))
    values = config.plain(cfg)  # missing values (???) and broken references end it here
    _raise(_wrong_kinds(cfg, values, command))
    problems: list[str] = []

    def judge(test: Callable[[], object]) -> None:
        try:
            test()
        except ValueError as error:
            problems.append(" ".join(str(error).split()))

    if "model" in cfg:
        judge(lambda: _check_model(cfg))
    if "aspects" in cfg:
        judge(lambda: config.buckets(cfg))
    if "mask_types" in cfg:
        judge(lambda: config.conditioning_inputs(cfg))
    for length in cfg.get("lengths", []):
        judge(lambda length=length: geometry.check_num_frames(length, key="lengths"))  # type: ignore[misc]
    for key in ("num_frames", "model.num_frames", "data.num_frames"):
        if (value := OmegaConf.select(cfg, key)) is not None:
            judge(lambda key=key, value=value: geometry.check_num_frames(value, key=key))  # type: ignore[misc]
    if cfg.get("height") is not None or cfg.get("width") is not None:
        judge(lambda: _check_picture(cfg))
    if command == "train":
        _check_training(cfg, judge, processes)
    if command == "sample":
        judge(lambda: _check_files(cfg))
        judge(lambda: _check_peers(cfg, processes))
    if command in ON_DISK:
        judge(lambda: _check_on_disk(cfg, *ON_DISK[command]))
    if command in ("encode", "sample"):
        judge(lambda: distributed.Part.read(cfg.part))
    if command == "encode" and cfg.upload is not None:
        judge(lambda: check_address(cfg.upload))
    problems.extend(heard.unheard(command, values, given).values())
    _raise(problems)


def _check_on_disk(cfg: DictConfig, key: str, instead: str) -> None:
    if "://" in str(cfg[key]):
        raise ValueError(f"{key}={cfg[key]} is an address, and must be a folder on this machine; {instead}")


def check_given(cfg: DictConfig, given: Iterable[str]) -> None:
    """ValueError for keys `given` that have no effect; of a config that may lack what it needs for other work."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    plain: dict[str, Any] = {str(key): value for key, value in values.items()}
    _raise(list(heard.unheard(_command_of(cfg), plain, given).values()))


def _raise(problems: list[str]) -> None:
    """ValueError with all problems, if there are any; each once."""
    problems = list(dict.fromkeys(problems))
    if problems:
        many = f"{len(problems)} problems:\n  - " if len(problems) > 1 else ""
        raise ValueError(many + "\n  - ".join(problems))


def _command_of(cfg: DictConfig) -> str:
    """The command whose config this is: the one that has the most of its keys."""
    return max(COMMANDS, key=lambda name: len({key.split(".")[0] for key in COMMANDS[name]} & set(cfg)))


def _wrong_groups(cfg: DictConfig, command: str) -> list[str]:
    """Groups that are no groups: what refers into them cannot be resolved."""
    schema = COMMANDS[command]
    groups = dict.fromkeys(key[: match.start()] for key in schema for match in re.finditer(r"\.", key))
    found = {key: OmegaConf.select(cfg, key, throw_on_resolution_failure=False) for key in groups if key not in schema}
    return [
        walk.group_problem(key, value, schema)
        for key, value in found.items()
        if value is not None and not isinstance(value, DictConfig)
    ]


def _wrong_kinds(cfg: DictConfig, values: Mapping[str, Any], command: str) -> list[str]:
    """What is no value of its key's kind. Of a reference the key that it leads to is named."""
    wrong = walk.problems(values, COMMANDS[command], config.named, command=command)
    sources = {key: _source(cfg, key) for key in wrong}
    return [
        sources[key] + line.removeprefix(key) for key, line in wrong.items() if sources[key] not in wrong.keys() - {key}
    ]


def _source(cfg: DictConfig, key: str) -> str:
    """The key where a value stands: the key itself, or the one that its reference leads to."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else cfg
    text = OmegaConf.to_container(node, resolve=False).get(name) if isinstance(node, DictConfig) else None  # type: ignore[union-attr]
    reference = re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)\}", text) if isinstance(text, str) else None
    return key if reference is None else _source(cfg, reference[1])


def _check_model(cfg: DictConfig) -> None:
    experts, boundary = list(cfg.model.experts), cfg.model.boundary
    if sorted(experts) not in (["dense"], ["high_noise", "low_noise"]):
        raise ValueError(f"model.experts={shown(experts)} must be [high_noise, low_noise], or [dense]")
    if len(experts) > 1 and boundary is None:
        raise ValueError("model.boundary=null: two experts need the sigma from which the high-noise expert answers")
    for name in experts:
        if cfg.model.guidance.get(name) is None:
            raise ValueError(f"model.guidance.{name}=null must be a number: the guidance scale of that expert")
        if "guidance" in cfg and cfg.guidance[name] is None:
            raise ValueError(f"guidance.{name}=null must be a number: the guidance scale of that expert")


def _check_training(cfg: DictConfig, judge: Callable[[Callable[[], object]], None], processes: int) -> None:
    """What the settings of a training mean together."""
    from wantrain.training.alternation import ExpertAlternation  # sample.py and export.py import nothing of training
    from wantrain.training.monitoring.trackers import check_tracker

    judge(lambda: _check_experts(cfg))
    judge(lambda: _check_noise(cfg))
    judge(lambda: config.batching(cfg, processes))
    judge(lambda: _check_packs(cfg))
    judge(lambda: _check_length(cfg))
    judge(lambda: check_name(cfg.run))
    judge(lambda: _check_adapter(cfg))
    judge(lambda: updates.check_updates(cfg, processes))
    if cfg.expert.name != "vae":
        judge(lambda: _check_memory(cfg))
    judge(lambda: config.shards(cfg))
    if cfg.data.get("schedule") is not None:
        judge(lambda: schedules.check_schedule(cfg, processes))
    if cfg.expert.name == "both":
        judge(lambda: ExpertAlternation.of(list(cfg.model.experts), config.plain(cfg.experts.share)))
    judge(lambda: _check_previews(cfg))
    judge(lambda: check_tracker(cfg.tracker.name))
    if "mask_types" in cfg.data:
        types, conditioning = config.plain(cfg.data.mask_types), cfg.data.conditioning
        judge(lambda: ConditioningInputs(types, conditioning, key="data.mask_types"))
    if cfg.adapter.name == "partial":
        part = config.plain(cfg.adapter)
        judge(lambda: partial.check(part["layers"], part["tags"], cfg.model.transformer.num_layers))


def _check_memory(cfg: DictConfig) -> None:
    """What is kept of a forward, and which weights wait on the host."""
    blocks, dtype = cfg.model.transformer.num_layers, DTYPES[cfg.activations_dtype]
    policy = ActivationPolicy(cfg.recompute, blocks=blocks, activations=cfg.activations, dtype=dtype)
    attention.check_name(cfg.attention)
    if cfg.sequence_parallel > 1:
        _check_sequence(cfg)
    if policy.keep_attention and cfg.attention in attention.NOT_KEPT:
        raise ValueError(
            f"recompute=attention keeps the output of a fused kernel, and attention={cfg.attention} has none that can "
            "be kept; give recompute=block, or another kernel"
        )
    if cfg.swap.blocks and cfg.adapter.name == "none":
        raise ValueError(
            f"swap.blocks={cfg.swap.blocks} keeps frozen weights on the host, but adapter=none trains them; give "
            "swap.blocks=0, or adapter=lora"
        )
    if cfg.swap.blocks not in (0, "auto"):
        check_swap(cfg.swap.blocks, policy.recomputed)


def _check_packs(cfg: DictConfig) -> None:
    """What clips of several sizes in one batch do not go together with."""
    if cfg.batch_tokens is None or cfg.expert.name == "vae":
        return
    packs = f"batch_tokens={cfg.batch_tokens} computes clips of several sizes at once"
    of_sets = (cfg.data.get("sets") or {}).values()
    if any(isinstance(each.get("caption_dropout"), ListConfig) for each in (cfg.data, *of_sets)):
        raise ValueError(f"{packs}, as many as fit; a caption_dropout by step needs batch_size=")
    if cfg.compile != "none":
        raise ValueError(f"{packs}, for which a compiled block is not made; give compile=none, or batch_size=")
    if cfg.loss.get("stratified"):
        raise ValueError(f"{packs}, and as many as fit; loss.stratified=true needs batch_size=")
    if cfg.preserve.weight:
        raise ValueError(f"{packs}, which preserve.weight={cfg.preserve.weight:g} cannot; give batch_size=")
    if not getattr(config.named(cfg.loss._target_), "packs", False):
        raise ValueError(f"{packs}, which {cfg.loss._target_} cannot; give batch_size=")
    if not getattr(config.named(cfg.model.transformer._target_), "packs", False):
        raise ValueError(f"{packs}, which {cfg.model.transformer._target_} cannot; give batch_size=")


def _check_sequence(cfg: DictConfig) -> None:
    """What processes that share the tokens of a clip do not go together with."""
    from wantrain.models.sequence import plan_of  # half a second, and only few trainings need it

    size = cfg.sequence_parallel
    plan_of(config.named(cfg.model.transformer._target_), size)
    if cfg.batch_tokens is not None:
        raise ValueError(
            f"sequence_parallel={size}: clips of several sizes in one sequence (batch_tokens={cfg.batch_tokens}) are "
            "not shared out; give batch_size=, or sequence_parallel=1"
        )


def _check_previews(cfg: DictConfig) -> None:
    if cfg.sample.prompts is not None and cfg.model.conditioning == "channel_concat":
        raise ValueError(
            f"sample.prompts={cfg.sample.prompts}: model={cfg.model.name} needs a conditioning input, so its previews "
            "go on from held-out clips; leave it out"
        )


def _check_files(cfg: DictConfig) -> None:
    """Files of known pixels that do not go together, or that the model does not take."""
    files = files_from(cfg)
    if files.first is not None:
        check_files(files, cfg.model.conditioning, model=cfg.model.name)


def _check_peers(cfg: DictConfig, processes: int) -> None:
    """Processes that make a video together: of a model that says how, and as many as were started, or with dry_run
    planned for.
    """
    if cfg.sequence_parallel > 1:
        from wantrain.models.sequence import plan_of

        plan_of(config.named(cfg.model.transformer._target_), cfg.sequence_parallel)
        if not (cfg.dry_run and processes == 1):
            distributed.check_shared(cfg.sequence_parallel, processes)


def _check_picture(cfg: DictConfig) -> None:
    if cfg.height is None or cfg.width is None:
        raise ValueError("height and width go together; give both, or neither for the model's own size")
    geometry.check_size(cfg.height, cfg.width, cfg.model.multiple, key="height, width")


def _check_experts(cfg: DictConfig) -> None:
    from wantrain.training.preserving import preserving

    for own in config.experts(cfg).values():
        _check_expert(own)
        _check_window(own)
        updates.check_optimizer(own.optimizer)
        updates.check_adaptive(own)
        config.build(own.schedule)
        # The loss has its own words on a noise distribution that cannot be.
        _check_base(own, preserving(config.build(own.loss), **config.plain(own.preserve)))


def _check_noise(cfg: DictConfig) -> None:
    """Noise for sets that are not there, and limits that leave nothing out of any expert's window."""
    if cfg.expert.name == "vae":
        return
    names = list(cfg.data.get("sets") or {})
    if wrong := [name for name in cfg.loss.get("sets") or {} if name not in names]:
        raise ValueError(f"noise.sets.{wrong[0]}: there is no such set; data.sets has {', '.join(names) or 'none'}")
    experts = config.experts(cfg).values()
    for key, default in (("weighting", "none"), ("sets", None)):
        if key not in cfg.loss and any(own.noise.get(key, default) != default for own in experts):
            raise ValueError(f"noise.{key}: loss={cfg.loss._target_} does not go by it; leave it out")
    for key, end, inside in (("min_sigma", "low", float.__gt__), ("max_sigma", "high", float.__lt__)):
        given = [(float(own.noise[key]), own.expert) for own in experts if own.noise[key] is not None]
        if given and not any(inside(limit, float(expert[end] or 0)) for limit, expert in given):
            limit, expert = given[0]
            raise ValueError(
                f"noise.{key}={limit:g} leaves nothing out of the noise window [{expert.low:g}, {expert.high:g}] of "
                f"expert={expert.name}; give a number inside it, or leave it out"
            )


def _check_expert(cfg: DictConfig) -> None:
    name, experts = cfg.expert.name, list(cfg.model.experts)
    further = cfg.model.transformer.in_channels - cfg.model.transformer.out_channels
    if cfg.init == "expand_input_channels" and name in experts and (not further or cfg.adapter.name != "none"):
        raise ValueError(
            f"init=expand_input_channels with model={cfg.model.name} (which has {further} further input channels) and "
            f"adapter={cfg.adapter.name}: it is for a model of conditioning channel_concat, all of whose weights are "
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
        if cfg.weights is None and cfg.parts.vae is None and "vae" not in cfg.model:
            raise ValueError("expert=vae needs weights= to start from, or model.vae as in recipe=wan_tiny_vae_images")
    elif name not in experts:  # also both, where the model is one transformer
        raise ValueError(
            f"expert={name}: model={cfg.model.name} has {', '.join(experts)}; "
            f"use {' or '.join(f'expert={other}' for other in experts)}, or another model="
        )


def _check_base(cfg: DictConfig, loss: LossFunction) -> None:
    """A loss that compares with the base needs an adapter, which can be switched off; pairs need a loss of pairs."""
    pairs = issubclass(config.named(cfg.data._target_), PairData)
    if isinstance(loss.core, Preference) != pairs:
        raise ValueError(
            "loss=preference and data=pairs go together: the loss learns from pairs of samples; give both, with "
            "data.pairs=TABLE"
        )
    if "base" in loss.networks and cfg.adapter.name in {"none", "partial"}:
        what = f"preserve.weight={cfg.preserve.weight:g}" if cfg.preserve.weight else "loss=preference"
        raise ValueError(
            f"{what} compares with the base, which is the model with its adapter off, and adapter={cfg.adapter.name} "
            "trains the base itself; give adapter=lora, dora or lokr"
        )
    if pairs and cfg.adapter.init is not None:
        raise ValueError(
            f"loss=preference compares with the model that the run starts from, and with adapter.init="
            f"{cfg.adapter.init} that is not the base; merge that adapter (python export.py weights=BASE "
            "lora.EXPERT=FILE out=DIR), then give weights=DIR and a new adapter"
        )


def _check_window(cfg: DictConfig) -> None:
    for key in ("expert.low", "expert.high", "loss.low", "loss.high"):
        group, _, name = key.partition(".")
        if name in cfg[group] and cfg[group][name] is None:
            raise ValueError(f"{key}=null must be a number at least 0 and at most 1: an end of the noise window")


def _check_adapter(cfg: DictConfig) -> None:
    """What is wrong with the settings of the chosen adapter, kinds apart."""
    settings = config.plain(cfg.adapter)
    if settings["name"] != "none" and cfg.expert.name == "vae":
        raise ValueError(f"adapter={settings['name']} is for transformers; with expert=vae give adapter=none")
    if cfg.base.dtype == "bf16" and cfg.precision == "fp32":
        raise ValueError("base.dtype=bf16: precision=fp32 computes with float32 weights; give precision=bf16 too")
    for key, kind in (("rank_pattern", Count), ("alpha_pattern", Positive)):
        for part, value in (settings.get(key) or {}).items():
            if not fits(value, kind):
                raise ValueError(f"adapter.{key}: {part}: {shown(value)} must be {described(kind)}")


def _check_length(cfg: DictConfig) -> None:
    if cfg.steps is not None and cfg.epochs is not None:
        raise ValueError(f"steps={cfg.steps} and epochs={cfg.epochs} both set the length; give one of them")
