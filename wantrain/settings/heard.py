"""When a setting has an effect: a key that was given although a choice leaves it without one is an error.

A default that is merely there is no error: only keys that the command line or a recipe gives are looked at. Nor is a
value that asks for nothing: null, false, off, none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wantrain.settings.kinds import shown
from wantrain.settings.schema import OF_AN_EXPERT


@dataclass(frozen=True)
class Rule:
    """Keys that have an effect under a condition only.

    keys       patterns of keys; a key stands for all below it
    when       of the resolved config and the keys given: whether they have an effect
    otherwise  why they have none; {key} is replaced by the value under that key
    """

    keys: tuple[str, ...]
    when: Callable[[Mapping[str, Any], frozenset[str]], bool]
    otherwise: str

    def covers(self, key: str) -> bool:
        """True if the rule is about this key."""
        return any(re.fullmatch(rf"{pattern}(\..+)?", key) for pattern in self.keys)

    def reason(self, values: Mapping[str, Any]) -> str:
        """Why its keys have no effect in this config."""
        return re.sub(r"\{([\w.]+)\}", lambda match: shown(value_at(values, match[1])), self.otherwise)


def unheard(command: str, values: Mapping[str, Any], given: Iterable[str]) -> dict[str, str]:
    """The keys given that have no effect, each with one line: the key, and the choice that leaves it without one.

    values  the resolved config as plain data
    given   the keys that the command line or a recipe sets to something; groups whose option was chosen too
    """
    keys = frozenset(given)
    found: dict[str, str] = {}
    for rule in RULES[command]:
        about = sorted(key for key in keys if rule.covers(key) and key not in found)
        if about and not rule.when(values, keys):
            found |= {key: f"{key} has no effect: {rule.reason(values)}" for key in about}
    return found


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None if there is none."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _equals(key: str, *wanted: Any) -> Callable[[Mapping[str, Any], frozenset[str]], bool]:
    return lambda values, given: value_at(values, key) in wanted


def _differs(key: str, *unwanted: Any) -> Callable[[Mapping[str, Any], frozenset[str]], bool]:
    return lambda values, given: value_at(values, key) not in unwanted


def _replaced(fact: str, key: str) -> Rule:
    """A default in the model's config that the key beside it replaces."""
    return Rule((re.escape(fact),), lambda values, given: key not in given, f"{key}={{{key}}} stands in its place")


def _is_pair(values: Mapping[str, Any], given: frozenset[str]) -> bool:
    return len(values["model"]["experts"]) > 1


def _own_expert(group: str, name: str) -> Rule:
    return Rule(
        (rf"{group}\.{name}",),
        lambda values, given: name in values["model"]["experts"],
        "model={model.name} has the experts {model.experts}",
    )


def _replaced_per_expert(key: str, place: str) -> Rule:
    """A setting in whose place every expert that is trained has one of its own."""

    def when(values: Mapping[str, Any], given: frozenset[str]) -> bool:
        name = values["expert"]["name"]
        trained = values["model"]["experts"] if name == "both" else [name]
        return any((values["experts"].get(each) or {}).get(key) is None for each in trained)

    return Rule((re.escape(place),), when, f"experts.NAME.{key} stands in its place for every expert that is trained")


def _new_adapter(name: str) -> Rule:
    """What describes a new adapter of one expert of a pair."""
    files = ("adapter.init", f"experts.{name}.init")
    return Rule(
        (rf"experts\.{name}\.(rank|alpha)",),
        lambda values, given: all(value_at(values, key) is None for key in files),
        "the adapter file that this expert goes on from has its own; leave out one of them",
    )


def _facts_unread(command: str, read: str) -> Rule:
    """The facts of a model that a command never reads: all but those named."""
    names = "|".join(read.split())
    return Rule(
        (rf"model\.(?!({names})(\.|$)).+",), lambda values, given: False, f"{command}.py reads no such fact of a model"
    )


def _is_remote(values: Mapping[str, Any], given: frozenset[str]) -> bool:
    data = values["data"]
    sets = [each for each in (data.get("sets") or {}).values() if isinstance(each, Mapping)]
    return any("://" in str(place.get("shards", "")) for place in (data, *sets))


def _is_sized(values: Mapping[str, Any]) -> bool:
    """True where something in a training has the model's own size: previews, a forecast, pixels, a shift by tokens."""
    shift = values["noise"]["shift"]
    by_size = isinstance(shift, Mapping) and "num_frames" in shift
    return bool(values["sample"]["every"] or values["dry_run"] or "num_frames" in values["data"] or by_size)


_EXPERTS = ("high_noise", "low_noise", "dense")
_PAIR_ONLY = Rule((r"model\.boundary",), _is_pair, "model={model.name} is one transformer over the whole noise range")
_REVISION = Rule((r"revision",), _differs("weights", None), "weights=null names no repository of the hub")
_PARTS = tuple(_own_expert("parts", name) for name in _EXPERTS)
_GUIDANCE = tuple(_own_expert("model.guidance", name) for name in _EXPERTS)
_NOT_VAE = _differs("expert.name", "vae")

_TRAIN = (
    Rule((r"experts\.(share|offload)",), _equals("expert.name", "both"), "expert={expert.name} trains one expert"),
    *(
        Rule(
            (rf"experts\.{name}",),
            _equals("expert.name", "both", name),
            "expert={expert.name} trains that one alone; its settings are optimizer.lr=, adapter.rank=, ema=, ...",
        )
        for name in ("high_noise", "low_noise")
    ),
    *(_replaced_per_expert(key, place) for key, place in OF_AN_EXPERT.items()),
    Rule((r"noise",), lambda values, given: "density" in values["loss"], "loss={loss._target_} draws no noise level"),
    Rule(
        (r"sample\.every",),
        lambda values, given: values["expert"]["name"] != "vae" or values["sample"]["every"] == 0,
        "expert=vae makes no previews",
    ),
    Rule(
        (r"sample\.(?!every$).+",), _differs("sample.every", 0), "sample.every=0 makes no previews; give sample.every=N"
    ),
    Rule(
        (r"sample\.offload",),
        lambda values, given: _is_pair(values, given) and values["expert"]["name"] != "both",
        "with expert={expert.name} of model={model.name} no expert waits while another trains",
    ),
    Rule(
        (r"validation\.(?!every$).+", r"checkpoint\.keep_best"),
        _differs("validation.every", 0),
        "validation.every=0 makes no validation",
    ),
    Rule(
        (r"validation\.(points|share|together|early_stopping_patience)",),
        _NOT_VAE,
        "the validation of expert=vae has no noise levels",
    ),
    Rule(
        (r"validation\.share",),
        lambda values, given: None in (values["validation"][key] for key in ("every", "clips", "points")),
        "validation.every, clips and points are all given",
    ),
    Rule(
        (
            r"check_expert",
            r"attention",
            r"(compile|sequence_parallel)",
            r"memory",
            r"recompute",
            r"activations(_dtype)?",
            r"swap",
        ),
        _NOT_VAE,
        "expert=vae trains no transformer",
    ),
    Rule((r"check_expert",), _differs("init", "scratch"), "init=scratch loads no expert"),
    Rule(
        (r"adapter\.(rank|alpha|rank_stabilized|targets|rank_pattern|alpha_pattern|factor|decompose_both)",),
        lambda values, given: value_at(values, "adapter.init") is None,
        "adapter.init={adapter.init} has its own; leave out one of them",
    ),
    *(_new_adapter(name) for name in ("high_noise", "low_noise")),
    Rule(
        (r"safeguards\.unlearning(_stop)?",),
        lambda values, given: "beta" in values["loss"],
        "loss={loss._target_} has no winners; it is for loss=preference",
    ),
    Rule((r"preserve\.prompts?",), _differs("preserve.weight", 0), "preserve.weight=0 preserves nothing"),
    Rule((r"gpu", r"bucket"), _equals("dry_run", True), "it is for dry_run=true, which plans for a card"),
    Rule(
        (r"base\.dtype",),
        _equals("adapter.name", "lora", "dora", "lokr"),
        "adapter={adapter.name} has no frozen base; it is for adapter=lora, dora or lokr",
    ),
    Rule((r"base\.low_rank",), _equals("base.dtype", "fp8", "int8", "nf4"), "it is for base.dtype=fp8, int8 or nf4"),
    Rule((r"batch_tokens",), _NOT_VAE, "expert=vae trains on pixels, which have no tokens; give batch_size="),
    Rule(
        (r"batch_size",),
        lambda values, given: None in (values["batch_tokens"], values["batch_size"]),
        "batch_tokens={batch_tokens} says how large a step is; leave it out, or give null in place of a recipe's",
    ),
    Rule(
        (r"model\.train\.(batch_size|micro_batch)",),
        _equals("batch_tokens", None),
        "batch_tokens={batch_tokens} says how large a step is",
    ),
    Rule((r"trained",), _NOT_VAE, "expert=vae trains in float32"),
    Rule(
        (r"trained",),
        _equals("adapter.name", "none", "partial"),
        "adapter={adapter.name} trains the adapter alone, in float32",
    ),
    Rule((r"trained\.rounding",), _equals("trained.dtype", "bf16"), "trained.dtype=fp32 rounds no weights"),
    Rule((r"clip_by",), _differs("clip", None), "clip=null clips nothing"),
    Rule((r"data\.sets\.[^.]+\.weight",), _equals("data.schedule", None), "data.schedule says what a set weighs"),
    Rule((r"data\.(cache|cache_gb)",), _is_remote, "no shards lie at a URL; those of a folder are read where they are"),
    Rule((r"loss\.(batch_size|seed)",), _equals("loss.stratified", True), "loss.stratified=false takes no parts"),
    Rule((r"loss\.mask_(rest|normalize)",), _differs("loss.mask", "none"), "loss.mask=none weighs nothing by masks"),
    Rule(
        (r"noise\.sets", r"loss\.sets"),
        lambda values, given: "sets" in values["data"],
        "the data are one set; it is for data=mixed",
    ),
    Rule(
        (r"data\.batch_size",),
        lambda values, given: any(
            isinstance(each.get("caption_dropout"), list)
            for each in (values["data"], *(values["data"].get("sets") or {}).values())
        ),
        "data.caption_dropout={data.caption_dropout} is the same at every step",
    ),
    Rule((r"schedule\.(decay|floor)",), _differs("schedule.shape", "constant"), "schedule.shape=constant never falls"),
    Rule(
        (r"tracker\.project",),
        _equals("tracker.name", "wandb", "trackio", "mlflow"),
        "tracker={tracker.name} has no projects",
    ),
    Rule((r"model\.train\.micro_batch",), _equals("accumulate", None), "accumulate={accumulate} says how many"),
    Rule(
        (r"model\.steps",),
        lambda values, given: values["steps"] is None and values["epochs"] is None,
        "steps={steps}, epochs={epochs} set the length",
    ),
    Rule(
        (r"model\.(num_frames|area)",),
        lambda values, given: _is_sized(values),
        "the latents say how long and how large clips are, and sample.every=0 makes no previews",
    ),
    Rule((r"model\.negative_prompt",), _differs("sample.every", 0), "sample.every=0 makes no previews"),
    Rule((r"model\.scratch",), _equals("init", "base"), "init={init} says what the expert starts from"),
    _replaced("model.train.batch_size", "batch_size"),
    _replaced("model.train.recompute", "recompute"),
    _replaced("model.precision", "precision"),
    _replaced("model.weights", "weights"),
    *_GUIDANCE,
    *_PARTS,
    _PAIR_ONLY,
    _REVISION,
)

_CAPTION = (
    Rule((r"(?!(source|apply)$).+",), _equals("apply", None), "apply={apply} only writes that table's edited captions"),
    Rule(
        (
            r"captioner(_revision)?",
            r"template|trigger|words|recaption",
            r"frames",
            r"max_tokens|batch_size",
            r"device|precision",
        ),
        _equals("review", False),
        "review=true only writes the table and the page of the captions that are there",
    ),
    Rule(
        (r"parts\.(high_noise|low_noise|dense|vae|text_encoder)",),
        lambda values, given: False,
        "caption.py reads the tokenizer alone",
    ),
    _replaced("model.weights", "weights"),
    _facts_unread("caption", "weights"),
    _REVISION,
)

_SHARD = (
    Rule(
        (r"(?!(init|out|model|decode)(\.|$)).+",),
        _equals("init", None),
        "init={init} looks at a folder only; it is for the settings file that is written",
    ),
    Rule((r"seed",), _equals("clips", "random"), "clips={clips} draws nothing; it is for clips=random"),
    Rule((r"lengths", r"stretch"), _differs("num_frames", 1), "num_frames=1 cuts clips of one frame"),
    _replaced("model.num_frames", "num_frames"),
    Rule(
        (r"model\.fps",),
        lambda values, given: "fps" not in given or values["fps"] == "resample",
        "fps={fps} stands in its place",
    ),
    _facts_unread("shard", "name num_frames fps"),
)

_ENCODE = (
    Rule(
        (r"(?!(check|out)$).+",),
        _differs("check", True),
        "check=true only compares the files of out= with their hashes",
    ),
    Rule((r"parts\.(high_noise|low_noise|dense)",), lambda values, given: False, "encode.py loads no transformer"),
    Rule((r"cache|cache_gb",), lambda values, given: "://" in str(values["shards"]), "shards={shards} is a folder"),
    _replaced("model.area", "area"),
    _replaced("model.precision", "precision"),
    _replaced("model.mask_types", "mask_types"),
    _replaced("model.weights", "weights"),
    _facts_unread(
        "encode",
        "name fps num_frames area multiple conditioning mask_types precision weights",
    ),
    _REVISION,
)

_SAMPLE = (
    Rule(
        (r"run", r"pairs"), _equals("compare", None), "compare={compare} names the runs, each with a folder below out="
    ),
    Rule((r"out",), _equals("pairs", None), "pairs={pairs} is the folder"),
    Rule(
        (r"runs",),
        lambda values, given: values["run"] is not None or values["compare"] is not None,
        "run=null and compare=null name no run",
    ),
    Rule((r"alone",), _is_pair, "model={model.name} has one transformer"),
    _replaced("model.sampling_steps", "steps"),
    _replaced("model.shift", "shift"),
    _replaced("model.num_frames", "num_frames"),
    _replaced("model.precision", "precision"),
    _replaced("model.negative_prompt", "negative_prompt"),
    *(_replaced(f"model.guidance.{name}", f"guidance.{name}") for name in _EXPERTS),
    *(_own_expert("guidance", name) for name in _EXPERTS),
    *_GUIDANCE,
    *_PARTS,
    _facts_unread(
        "sample",
        "name experts boundary shift fps num_frames area multiple conditioning guidance "
        "sampling_steps negative_prompt precision transformer vae",
    ),
    _PAIR_ONLY,
    _REVISION,
)

_EXPORT = (
    Rule((r"(?!inspect$).+",), _equals("inspect", None), "inspect={inspect} only says what that file is"),
    Rule(
        (r"model\.(?!name$).+",),
        _equals("run", None),
        "run={run} was trained with its own facts of the model",
    ),
    Rule((r"runs", r"measure"), _differs("run", None), "run=null names no run"),
    Rule((r"alone",), _is_pair, "model={model.name} has one transformer"),
    *_GUIDANCE,
    *_PARTS,
    _facts_unread("export", "name experts boundary shift conditioning guidance sampling_steps transformer"),
    _PAIR_ONLY,
    _REVISION,
)


def _is_checked(*names: str) -> Callable[[Mapping[str, Any], frozenset[str]], bool]:
    return lambda values, given: not values["checks"] or bool({*names} & {*values["checks"]})


_DOCTOR = (
    Rule((r"device",), _is_checked("card", "attention", "training"), "checks={checks} compute on no device"),
    Rule((r"runs",), _is_checked("disk"), "checks={checks} look at no disk"),
    Rule((r"timeout",), _is_checked("hub"), "checks={checks} ask no network"),
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "caption": _CAPTION,
    "shard": _SHARD,
    "encode": _ENCODE,
    "train": _TRAIN,
    "sample": _SAMPLE,
    "export": _EXPORT,
    "doctor": _DOCTOR,
}
