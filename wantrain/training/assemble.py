"""Putting a run's pieces together from plain settings: what is trained, what watches it."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from wantrain import geometry, world
from wantrain.data import SETS
from wantrain.losses import FlowMatching
from wantrain.models import Base
from wantrain.models.hosted import Residence
from wantrain.sampling import House, Sampler, Settings, read_prompts
from wantrain.sampling.generate import Velocity
from wantrain.training import replay, which_expert
from wantrain.training.checkpoint import Checkpoints
from wantrain.training.ema import Ema
from wantrain.training.gather import build_sampler, encode_texts
from wantrain.training.loop import Run
from wantrain.training.member import Member, read_average
from wantrain.training.meter import Meter, peak_of
from wantrain.training.metrics import Metrics
from wantrain.training.optim import build_optimizer
from wantrain.training.parallel import SHARDED, engine_of
from wantrain.training.preview import Asked, Preview, as_trained
from wantrain.training.protocols import Data, Hook, Latents
from wantrain.training.run import RunFolder
from wantrain.training.start import Start
from wantrain.training.stepper import Stepper
from wantrain.training.trainee import Trainee
from wantrain.training.tripwires import Tripwires
from wantrain.training.validators import build_validators
from wantrain.training.waiting import on_main

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


def wanted(settings: Mapping[str, Any], experts: Iterable[str]) -> list[str]:
    """The parts of the base that a run reads: what trains, and with previews all that sampling takes.

    Of a repository of the hub these alone are downloaded.
    """
    if not settings["sample"]["every"]:
        return list(experts)
    return [*dict.fromkeys([*experts, *settings["model"]["experts"]]), "vae", "text_encoder", "tokenizer"]


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
                texts=texts,
            )
        )
    return hooks


def preview_texts(
    data: Data, settings: Mapping[str, Any], home: Home, base: Base, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Embeddings of all texts that previews ask for, on the processes that sample; none where nothing is previewed.

    To be called before the experts are loaded, which leave no room for the text encoder. The main process encodes.
    """
    if not settings["sample"]["every"] or settings["expert"]["name"] == "vae":
        return {}

    def encode() -> dict[str, Tensor]:
        asked = what_to_show(data, settings["model"], settings["sample"]["prompts"], settings["sample"]["count"])
        texts = [*(each.prompt for each in asked), settings["model"]["negative_prompt"]]
        return encode_texts(base, texts, device=home.accelerator.device, dtype=dtype)

    texts = on_main(encode, "encoding the previews' texts")
    return texts if world.is_main() or home.engine in SHARDED else {}


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
    engine = engine_of(accelerator)
    hosted = check_engine(engine, experts)
    device = torch.device("cpu") if hosted or engine in SHARDED else accelerator.device
    return Home(accelerator, engine, device, Residence(accelerator.device) if hosted else None)


def card_of(home: Home) -> int | None:
    """Bytes of the GPU that holds the whole run; None on a CPU, or where processes share it out."""
    if home.engine not in {"single", "ddp"} or home.accelerator.device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(home.accelerator.device).total_memory)


def check_engine(engine: str, experts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the experts wait for their turn on the host; ValueError if the engine cannot train them, or not so."""
    pair = len(experts) > 1
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
    return hosted


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


def guards(folder: RunFolder, home: Home, *, steps: int, fps: float, tripwires: Mapping[str, Any]) -> dict[str, Any]:
    """What watches over a run, as a Run takes it: its log, its meter and its tripwires."""
    # The watchdog is none of them: it watches from before there is a run.
    wires = {key: value for key, value in tripwires.items() if key != "hang"}
    return {
        "metrics": Metrics(folder.metrics, steps=steps, peak=peak_of(home.accelerator.device)),
        "meter": Meter(fps),
        "tripwires": Tripwires(folder.tripped, **wires),
    }


def check_experts(run: Run, starts: Mapping[str, Start], *, how: str) -> None:
    """Measure whether what was loaded is the expert it is taken for (see which_expert), where that can be known and is
    asked for: `how` is warn, stop or off.
    """
    for name, member in run.members.items():
        if how != "off" and starts[name].is_measurable():
            told: dict[str, Any] = {"model": starts[name].model, "expert": name, "how": how, "seed": run.seed}
            with member.watched():
                which_expert.check(member.stepper, run.first_batch(), **told)


def preview_sampler(
    run: Run, *, model: Mapping[str, Any], base: Base, dtype: torch.dtype, idle: str, offload: str, widen: bool = False
) -> Callable[[], AbstractContextManager[Sampler]]:
    """What opens a sampler over the experts in training, with the other one from the base where only one is.

    The other one waits as `idle` says (see House) and is off the device between previews. Where the base has none, the
    one in training answers for every noise level; that is said once.
    """
    device = next(iter(run.members.values())).stepper.device
    own: dict[str, Velocity] = {name: as_trained(member.stepper) for name, member in run.members.items()}
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
    models = ChainMap(own, cast(dict[str, Velocity], house))

    @contextmanager
    def open_sampler() -> Iterator[Sampler]:
        try:
            facts = {"boundary": model["boundary"], "way": model["told_by"]}
            yield build_sampler(models, base=base, device=device, dtype=dtype, **facts)
        finally:
            house.leave()

    return open_sampler
