"""What a run evaluates: validation of each expert, and previews."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wantrain import geometry
from wantrain.losses import FlowMatching
from wantrain.models import Base
from wantrain.sampling import ExpertOffloader, Sampler, Settings, read_prompts
from wantrain.sampling.build import build_sampler, encode_texts
from wantrain.sampling.generate import Velocity
from wantrain.training.engine.accelerator import SHARDED
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.placement import Placement
from wantrain.training.loop import Run
from wantrain.training.protocols import Data, Hook, Latents
from wantrain.training.validation.preview import Preview, PreviewRequest, as_trained
from wantrain.training.validation.validators import build_validators
from wantrain.util import distributed
from wantrain.util.console import say


def build_hooks(
    run: Run,
    settings: Mapping[str, Any],
    *,
    base: Base,
    folder: Path,
    texts: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[Hook]:
    """What looks at a run: validation of each expert, and previews (into `folder`) if they are wanted, of `texts`."""
    model, sample = settings["model"], settings["sample"]
    hooks = build_validators(run, **settings["validation"])
    distribution = next(iter(run.trainers.values())).loss
    if sample["every"] and isinstance(distribution, FlowMatching):
        how = Settings(
            guidance=model["guidance"],
            shift=model["shift"],
            steps=sample["steps"],
            negative_prompt=model["negative_prompt"],
        )
        hooks.append(
            Preview(
                [trainer.stepper for trainer in run.trainers.values()],
                preview_sampler(
                    run,
                    model=model,
                    base=base,
                    dtype=dtype,
                    idle=sample["idle"],
                    offload=sample["offload"],
                    widen=settings["init"] == "widen",
                ),
                how,
                asked=what_to_show(run.data, model, sample["prompts"], sample["count"]),
                fps=model["fps"],
                seed=sample["seed"],
                every=sample["every"],
                steps=run.steps,
                folder=folder,
                tracker=run.metrics.tracker,
                texts=texts,
            )
        )
    return hooks


def preview_texts(
    data: Data, settings: Mapping[str, Any], placement: Placement, base: Base, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Embeddings of all texts that previews ask for, on the processes that sample; none where nothing is previewed.

    To be called before the experts are loaded, which leave no room for the text encoder. The main process encodes.
    """
    if not settings["sample"]["every"] or settings["expert"]["name"] == "vae":
        return {}

    def encode() -> dict[str, Tensor]:
        asked = what_to_show(data, settings["model"], settings["sample"]["prompts"], settings["sample"]["count"])
        texts = [*(each.prompt for each in asked), settings["model"]["negative_prompt"]]
        return encode_texts(base, texts, device=placement.accelerator.device, dtype=dtype)

    texts = on_main(encode, "encoding the previews' texts")
    return texts if distributed.is_main() or placement.engine in SHARDED else {}


def what_to_show(data: Data, model: Mapping[str, Any], prompts: str | None, count: int) -> list[PreviewRequest]:
    """What previews show: a file's prompts or held-out captions, at the model's size; without a file a model that is
    told what is known of a video goes on from what it knows of held-out clips, at their sizes.
    """
    if model["told_by"] is not None and prompts is None:
        return [PreviewRequest(*example) for example in cast(Latents, data).examples(count)]
    size = geometry.sizes(model["area"], model["multiple"], [1.0])[0]
    bucket = geometry.Bucket(model["num_frames"], *size)
    return [
        PreviewRequest(prompt, bucket) for prompt in (read_prompts(prompts) if prompts else data.captions())[:count]
    ]


def preview_sampler(
    run: Run, *, model: Mapping[str, Any], base: Base, dtype: torch.dtype, idle: str, offload: str, widen: bool = False
) -> Callable[[], AbstractContextManager[Sampler]]:
    """What opens a sampler over the experts in training, with the other one from the base where only one is.

    The other one waits as `idle` says (see ExpertOffloader) and is off the device between previews. Where the base has
    none, the one in training answers for every noise level; that is said once.
    """
    device = next(iter(run.trainers.values())).stepper.device
    own: dict[str, Velocity] = {name: as_trained(trainer.stepper) for name, trainer in run.trainers.items()}
    others = [name for name in model["experts"] if name not in own]
    if not all(base.holds(name) for name in others):
        say(f"previews: {base} holds no {others[0]}, so {', '.join(own)} answers for every noise level")
        others = []
    house = ExpertOffloader(
        others,
        lambda name, where: base.transformer(name, widen=widen, device=where, dtype=dtype),
        device,
        idle=idle,
        offload=offload,
    )
    models = ChainMap(own, cast(dict[str, Velocity], house))

    @contextmanager
    def open_sampler() -> Iterator[Sampler]:
        try:
            facts = {"boundary": model["boundary"], "way": model["told_by"]}
            yield build_sampler(models, base=base, device=device, dtype=dtype, **facts)
        finally:
            house.leave()

    return open_sampler
