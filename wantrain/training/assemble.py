"""Putting a run's pieces together from plain settings: what is trained, what watches it."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from wantrain import geometry, world
from wantrain.batch import Batch
from wantrain.data import SETS
from wantrain.losses import FlowMatching
from wantrain.models import Base, weights
from wantrain.sampling import House, Sampler, Settings, read_prompts
from wantrain.training import replay, which_expert
from wantrain.training.checkpoint import Checkpoints
from wantrain.training.ema import Ema
from wantrain.training.gather import build_sampler
from wantrain.training.loop import Run
from wantrain.training.measure import Clips, Probe, one_by_one
from wantrain.training.member import Member, read_average
from wantrain.training.meter import Meter, peak_of
from wantrain.training.metrics import Metrics
from wantrain.training.optim import build_optimizer
from wantrain.training.parallel import SHARDED, engine_of
from wantrain.training.preview import Asked, Preview
from wantrain.training.protocols import Data, Hook, Latents
from wantrain.training.readings import Readings
from wantrain.training.residence import Residence
from wantrain.training.run import RunFolder
from wantrain.training.start import Start
from wantrain.training.stepper import Stepper
from wantrain.training.trainee import Trainee
from wantrain.training.tripwires import Tripwires
from wantrain.training.validate import ReconstructionValidator, Validator, describe, settled
from wantrain.training.waiting import on_main
from wantrain.training.watchdog import Watchdog

#: Optimizers that look at whole matrices, or at blocks of them, and not at each element: class -> what users call it.
WHOLE = {"MuonAdamW": "muon", "Muon": "torch.optim.Muon", "Adafactor": "adafactor", "adamw_8bit": "adamw_8bit"}


def make_own_data(places: Iterable[str], *, root: Path) -> None:
    """Make the project's own footage and shards (data/NAME/latents) if they are asked for and not there, and say so.

    Main process only; leaves with the child's exit code where that fails. `root` is the folder of demo.py.
    """
    for shards in map(Path, places):
        ours = shards.parent in {Path("data", name) for name in SETS}
        if world.is_main() and ours and not (shards / "manifest.json").is_file():
            world.say(f"making {shards.parent} (procedural clips; once)")
            make = [sys.executable, str(root / "demo.py"), "data", shards.parent.name]
            if code := subprocess.run(make, check=False, env=world.alone()).returncode:
                sys.exit(code)  # the child has said what is wrong


def check_encoders(manifest: Mapping[str, Any], base: Base, places: Iterable[str], dtype: torch.dtype) -> None:
    """Raise ValueError unless the latents were made by the VAE and text encoder of the base (those that it holds).

    `places` are where they come from, for what is said.
    """
    shards = ", ".join(places)
    loads: dict[str, Callable[[], nn.Module]] = {
        "vae": base.vae,
        "text_encoder": lambda: base.text_encoder(dtype=dtype),
    }
    for what, load in loads.items():
        if not base.holds(what):
            world.say(f"{base} holds no {what}: nobody can say whether {shards} was encoded by the right one")
            continue
        made_by, ours = manifest[f"{what}_fingerprint"], weights.fingerprint(load())
        if made_by != ours:
            raise ValueError(
                f"data.shards={shards} was encoded by another {what} (fingerprint {made_by}, {base} has {ours}); "
                f"encode again with python encode.py and this run's weights= and parts.*=, or give those they were "
                "encoded with"
            )


def build_hooks(
    run: Run, settings: Mapping[str, Any], *, base: Base, folder: Path, dtype: torch.dtype = torch.float32
) -> list[Hook]:
    """What looks at a run: validation of each expert, and previews (into `folder`) if they are wanted."""
    model, sample = settings["model"], settings["sample"]
    hooks = build_validators(run, **settings["validation"])
    law = next(iter(run.members.values())).loss
    if sample["every"] and isinstance(law, FlowMatching):
        how = Settings(
            guidance=model["guidance"],
            shift=model["shift"],
            steps=sample["steps"],
            negative_prompt=model["negative_prompt"],
        )
        hooks.append(
            Preview(
                [member.stepper for member in run.members.values()],
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
            )
        )
    return hooks


def what_to_show(data: Data, model: Mapping[str, Any], prompts: str | None, count: int) -> list[Asked]:
    """What previews show: a file's prompts or held-out captions, at the model's size; without a file a model that is
    told what is known of a video goes on from what it knows of held-out clips, at their sizes.
    """
    if model["told_by"] is not None and prompts is None:
        return [Asked(*example) for example in cast(Latents, data).examples(count)]
    size = geometry.sizes(model["area"], model["multiple"], [1.0])[0]
    bucket = geometry.Bucket(model["num_frames"], *size)
    return [Asked(prompt, bucket) for prompt in (read_prompts(prompts) if prompts else data.captions())[:count]]


@dataclass(frozen=True)
class Home:
    """Where a run's experts live.

    device     where weights are loaded to at first; an engine that cuts them up takes them from the host
    residence  keeps the frozen weights of the expert whose turn it is not on the host, if that is wanted
    """

    accelerator: Accelerator
    engine: str
    device: torch.device
    residence: Residence | None


def find_home(accelerator: Accelerator, experts: Mapping[str, Mapping[str, Any]]) -> Home:
    """The home of the experts of a run, by their settings. ValueError if the engine cannot train them, or not so."""
    engine, pair = engine_of(accelerator), len(experts) > 1
    if pair and engine.startswith("zero"):
        raise ValueError(
            f"expert=both: DeepSpeed holds one model per job, and the launch file chose {engine}. Start two jobs, one "
            f"per expert, with: bash launch/pair.sh launch/accelerate/{engine}.yaml data.shards=DIR (what follows is "
            "train.py's); or train both in one job with launch/accelerate/fsdp2.yaml or ddp.yaml"
        )
    hosted = False
    for own in experts.values():
        whole = WHOLE.get(own["optimizer"]["_target_"].rpartition(".")[2])
        if whole is not None and engine not in {"single", "ddp"}:
            raise ValueError(
                f"optimizer={whole} needs whole matrices, but {engine} cuts them; use optimizer=adamw, or "
                "launch/accelerate/ddp.yaml"
            )
        if own["ema"] is not None and engine == "zero3":
            raise ValueError(
                f"ema={own['ema']} under ZeRO-3: DeepSpeed keeps the weights' parts where no average can follow; use "
                "launch/accelerate/fsdp2.yaml or zero2.yaml, or ema=null"
            )
        hosted = pair and own["experts"]["idle"] == "cpu"
        if hosted and engine == "fsdp2":
            raise ValueError("experts.idle=cpu: fsdp2 keeps only parts of the weights anywhere; give experts.idle=gpu")
        if hosted and own["adapter"]["name"] == "none":
            raise ValueError(
                "experts.idle=cpu keeps frozen weights on the host, but adapter=none trains them; give "
                "experts.idle=gpu, or adapter=lora"
            )
    device = torch.device("cpu") if hosted or engine in SHARDED else accelerator.device
    return Home(accelerator, engine, device, Residence(accelerator.device) if hosted else None)


def open_run(
    folder: RunFolder, settings: Mapping[str, Any], home: Home, *, data: str, command: Iterable[str]
) -> tuple[Checkpoints, Path | None]:
    """Open a run's folder for `settings` and write down how it was started; its checkpoints, and the newest good one,
    which all processes agree on. `data` is the manifest's hash, `command` what was typed.
    """
    how = {key: value for key, value in settings["checkpoint"].items() if key != "every"}
    checkpoints = Checkpoints(folder.checkpoints, **how)

    def open_and_look() -> Path | None:
        folder.open(dict(settings))
        processes, device = home.accelerator.num_processes, device_name(home.accelerator.device)
        start = replay.described(command, data=data, engine=home.engine, processes=processes, device=device)
        if settings["replay"]:
            replay.told(Path(settings["replay"]), start)
        replay.record(folder.record, start, settings)
        checkpoints.prepare()
        return checkpoints.newest()

    return checkpoints, on_main(open_and_look, "opening the run's folder")


def compare_replay(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Hold a replay's losses against those of the run it repeats. ValueError if they part."""
    if settings["replay"] and world.is_main():
        world.say(replay.compare(Path(settings["replay"]), folder.metrics))


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def enlist(
    trainee: Trainee,
    home: Home,
    *,
    checkpoint: Path | None,
    optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    how: Mapping[str, Any],
    ema: float | None,
    **own: Any,
) -> Member:
    """Make what is trained a member of a run: first its weights from the checkpoint if there is one, then its engine.

    `optimizer` makes one over parameter groups; `how` is what a Stepper is told; `own` is the rest of a Member.
    """
    average = None if checkpoint is None else read_average(trainee, checkpoint / own["folder"])
    stepper = Stepper(home.accelerator, trainee.module, build_optimizer(optimizer, trainee.module), **how)
    if home.residence is not None:
        home.residence.add(trainee.module)
    kept = None if ema is None else Ema(stepper, ema, average)
    return Member(trainee=trainee, stepper=stepper, ema=kept, **own)


def guards(
    folder: RunFolder, home: Home, *, steps: int, fps: float, hang: float | None, **wires: Any
) -> dict[str, Any]:
    """What watches over a run: its log, its meter, its tripwires and its watchdog, as a Run takes them."""
    return {
        "metrics": Metrics(folder.metrics, steps=steps, peak=peak_of(home.accelerator.device)),
        "meter": Meter(fps),
        "tripwires": Tripwires(folder.tripped, **wires),
        "watchdog": Watchdog(hang),
    }


def check_experts(run: Run, starts: Mapping[str, Start], *, how: str) -> None:
    """Measure whether what was loaded is the expert it is taken for (see which_expert), where that can be known."""
    for name, member in run.members.items():
        if starts[name].is_measurable():
            told: dict[str, Any] = {"model": starts[name].model, "expert": name, "how": how, "seed": run.seed}
            with member.watched():
                which_expert.check(member.stepper, run.first_batch(), **told)


def build_validators(
    run: Run, *, every: int, clips: int, points: int, together: int, stop_after: int | None
) -> list[Hook]:
    """The validation that goes with each expert's loss, over at most `clips` held-out clips; it may end the run."""
    batches = run.data.heldout_batches(clips)
    if stop_after is not None and not (batches and all(isinstance(m.loss, FlowMatching) for m in run.members.values())):
        raise ValueError(
            f"validation.stop_after={stop_after} asks held-out clips of a transformer when to end, but there are none; "
            "raise data.holdout, or give validation.stop_after=null"
        )
    if not batches:
        world.say("no clips are held out (data.holdout is 0, or there are too few files): there is no validation")
        return []
    if not all(isinstance(member.loss, FlowMatching) for member in run.members.values()):
        singles = one_by_one(batches)
        return [ReconstructionValidator(member.stepper, singles, every, run.steps) for member in run.members.values()]
    data = cast(Latents, run.data)
    heldout, train = (measured_clips(data, some) for some in (batches, data.train_batches(clips)))
    world.say(describe(heldout, train, points))
    validators, readings = [], Readings(run.metrics.path.with_name("validation.jsonl"))
    for member in run.members.values():
        probe = Probe(member.stepper, cast(FlowMatching, member.loss).quadrature(points), run.seed, together)
        validator = Validator(
            member,
            probe,
            heldout,
            train,
            readings,
            every=every,
            steps=run.steps,
            prefix=f"{member.name}/" if len(run.members) > 1 else "",
        )
        validators.append(validator)
    run.settled = partial(settled, validators, stop_after)
    return [*validators]


def measured_clips(data: Latents, batches: list[Batch]) -> Clips:
    """Clips as validation takes them: each alone, with the file that it is of and its tags."""
    singles = one_by_one(batches)
    numbers = [clip.positions[0] for clip in singles]
    return Clips(singles, data.groups_of(numbers), data.tags_of(numbers))


def preview_sampler(
    run: Run, *, model: Mapping[str, Any], base: Base, dtype: torch.dtype, idle: str, offload: str, widen: bool = False
) -> Callable[[], AbstractContextManager[Sampler]]:
    """What opens a sampler over the experts in training, with the other one from the base where only one is.

    The other one waits as `idle` says (see House) and is off the device between previews. Where the base has none, the
    one in training answers for every noise level; that is said once.
    """
    device = next(iter(run.members.values())).stepper.device
    own: dict[str, nn.Module] = {name: member.stepper.module for name, member in run.members.items()}
    others = [name for name in model["experts"] if name not in own]
    if not all(base.holds(name) for name in others):
        world.say(f"previews: {base} holds no {others[0]}, so {', '.join(own)} answers for every noise level")
        others = []
    house = House(
        others,
        lambda name, where: base.transformer(name, widen=widen, device=where, dtype=dtype),
        device,
        idle=idle,
        offload=offload,
    )
    models = ChainMap(own, cast(dict[str, nn.Module], house))

    @contextmanager
    def open_sampler() -> Iterator[Sampler]:
        try:
            facts = {"boundary": model["boundary"], "way": model["told_by"]}
            yield build_sampler(models, base=base, device=device, dtype=dtype, **facts)
        finally:
            house.leave()

    return open_sampler
