"""What evaluates a run: validation of each expert, and previews."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from wantrain import geometry
from wantrain.data import TrainingData
from wantrain.models import Base
from wantrain.models.offload import OffloadPolicy
from wantrain.sampling import ExpertOffloader, Sampler, Settings, read_prompts
from wantrain.sampling.build import build_sampler, encode_texts
from wantrain.sampling.generate import Velocity
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.placement import Placement
from wantrain.training.expert import ExpertTrainer
from wantrain.training.monitoring.trackers import Tracker
from wantrain.training.options import ExpertOptions, RunSetup
from wantrain.training.validation.preview import AsTrained, Preview, PreviewRequest
from wantrain.training.validation.validators import Evaluations, build_validators
from wantrain.util import distributed
from wantrain.util.console import say


def build_evaluations(setup: RunSetup, trainers: Mapping[str, ExpertTrainer], tracker: Tracker) -> Evaluations:
    """Validation of each expert, and previews if they are wanted."""
    evaluations = build_validators(setup, trainers)
    if not makes_previews(setup.settings):
        return evaluations
    model, sample = setup.settings["model"], setup.settings["sample"]
    preview = Preview(
        [trainer.stepper for trainer in trainers.values()],
        preview_sampler(setup, trainers),
        Settings(
            guidance=model["guidance"],
            shift=model["shift"],
            steps=sample["steps"],
            negative_prompt=model["negative_prompt"],
        ),
        requests=what_to_show(setup.data, model, sample["prompts"], sample["count"]),
        fps=model["fps"],
        seed=sample["seed"],
        every=sample["every"],
        steps=setup.steps,
        folder=setup.folder.samples,
        tracker=tracker,
        texts=setup.texts,
    )
    return replace(evaluations, hooks=[*evaluations.hooks, preview])


def makes_previews(settings: Mapping[str, Any]) -> bool:
    """True if previews are wanted and the run trains what can be sampled."""
    return bool(settings["sample"]["every"]) and settings["expert"]["name"] != "vae"


def texts_needed(
    data: TrainingData[Any],
    settings: Mapping[str, Any],
    experts: Mapping[str, ExpertOptions],
    placement: Placement,
    base: Base,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Embeddings of the losses' prompts, on every process, and of all texts that previews need, on those that sample.

    To be called before the experts are loaded, which leave no room for the text encoder. The main process encodes.
    """
    wanted = [prompt for expert in experts.values() for prompt in expert.loss.prompts]
    shown = makes_previews(settings)
    if not wanted and not shown:
        return {}

    def encode() -> dict[str, Tensor]:
        texts = list(wanted)
        if shown:
            some = what_to_show(data, settings["model"], settings["sample"]["prompts"], settings["sample"]["count"])
            texts += [*(each.prompt for each in some), settings["model"]["negative_prompt"]]
        return encode_texts(base, texts, device=placement.device, dtype=dtype)

    texts = on_main(encode, "encoding texts")
    samples = distributed.is_main() or placement.every_process_samples
    return {text: embedding for text, embedding in texts.items() if samples or text in wanted}


def what_to_show(
    data: TrainingData[Any], model: Mapping[str, Any], prompts: str | None, count: int
) -> list[PreviewRequest]:
    """What previews show: a file's prompts or held-out captions, at the model's size; without a file a model with
    conditioning goes on from the conditioning of held-out clips, at their sizes.
    """
    if model["conditioning"] != "none" and prompts is None:
        return [PreviewRequest(*example) for example in data.examples(count)]
    size = geometry.sizes(model["area"], model["multiple"], [1.0])[0]
    bucket = geometry.Bucket(model["num_frames"], *size)
    return [
        PreviewRequest(prompt, bucket) for prompt in (read_prompts(prompts) if prompts else data.captions())[:count]
    ]


def preview_sampler(
    setup: RunSetup, trainers: Mapping[str, ExpertTrainer]
) -> Callable[[], AbstractContextManager[Sampler]]:
    """What opens a sampler over the experts in training, with the other one from the base where only one is.

    The other one waits as `sample.offload` says (see ExpertOffloader) and is off the device between previews. Where the
    base has none, the one in training answers for every noise level; that is said once.
    """
    settings, base, device = setup.settings, setup.base, setup.placement.device
    model, sample, expand = settings["model"], settings["sample"], settings["init"] == "expand_input_channels"
    own: dict[str, Velocity] = {name: AsTrained(trainer.stepper) for name, trainer in trainers.items()}
    others = [name for name in model["experts"] if name not in own]
    if not all(base.holds(name) for name in others):
        say(f"previews: {base} holds no {others[0]}, so {', '.join(own)} answers for every noise level")
        others = []

    def load(name: str, where: torch.device) -> nn.Module:
        module = base.transformer(name, expand_inputs=expand, device=where, dtype=setup.dtype)
        if setup.placement.sequence is not None:
            setup.placement.sequence.split(module)
        return module

    offloader = ExpertOffloader(others, load, device, OffloadPolicy(**sample["offload"]))
    models = ChainMap(own, cast(dict[str, Velocity], offloader))

    @contextmanager
    def open_sampler() -> Iterator[Sampler]:
        try:
            facts = {"boundary": model["boundary"], "conditioning": model["conditioning"]}
            yield build_sampler(models, base=base, device=device, dtype=setup.dtype, **facts)
        finally:
            offloader.offload()

    return open_sampler
