"""A dry run: what a run will be, said without weights, data or a network; and the same as the run itself."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wantrain import config
from wantrain.models.formats import base as bases
from wantrain.models.formats import loading
from wantrain.training.engine.updates import UpdateOptions
from wantrain.training.initialize import Initializer
from wantrain.training.planning import memory
from wantrain.training.planning.outline import find_clips, outline

ROOT = Path(__file__).resolve().parent.parent.parent.parent
ADAPTERS = {
    "none": ("adapter=none",),
    "lora": ("adapter=lora", "adapter.rank=4"),
    "dora": ("adapter=dora", "adapter.rank_pattern={ffn: 2}", "adapter.rank_stabilized=true"),
    "lokr": ("adapter=lokr", "adapter.rank=2", "adapter.factor=4", "adapter.alpha_pattern={ffn: 3}"),
    "nf4": ("adapter=lora", "adapter.rank=4", "base.dtype=nf4"),
    "low rank": ("adapter=lora", "adapter.rank=4", "base.dtype=nf4", "base.low_rank=8", "precision=bf16"),
    "int8": ("adapter=dora", "base.dtype=int8", "precision=bf16"),
    "fp32": ("adapter=lora", "base.dtype=fp32", "precision=bf16"),
    "partial": ("adapter=partial", "adapter.tags=[ffn]", "precision=bf16"),
    "bf16": ("adapter=none", "trained.dtype=bf16", "precision=bf16"),
    "bf16 partial": ("adapter=partial", "adapter.tags=[ffn, norm]", "trained.dtype=bf16", "precision=bf16"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outline(adapter, pair, tiny):
    """An outline is the trained module without its values.

    The same parameters, shapes, dtypes and gradients as what is loaded, on the device without memory.
    """
    cfg = config.compose("train", [*tiny.train, f"weights={pair}", *ADAPTERS[adapter]])
    own, dtype = config.plain(cfg), config.dtype(cfg.precision)
    where = {"base": config.base(cfg, []), "device": torch.device("cpu"), "dtype": dtype}
    loaded = Initializer.of(config.network(cfg), own, **where).trainable().module
    drawn = outline(config.network(cfg), own, dtype)

    def about(module):
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()}

    assert about(drawn) == about(loaded)
    assert {p.device.type for p in drawn.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [("adamw", 8.0), ("muon", 4.0), ("other", 0.0), ("adafactor", 2 * 4 / memory.SIDE)],
)
def test_optimizer_state_bytes(optimizer, state):
    """The bytes per parameter follow the optimizers' papers: two moments, one, none, a row and a column of means."""
    make = config.build(config.compose("train", [f"optimizer={optimizer}"]).optimizer, _partial_=True)
    assert memory.state_bytes(make) == pytest.approx(state)


def test_documented_bytes():
    """The table of docs/memory.md has the planner's bytes per weight."""
    pytest.importorskip("torchao", reason="the extra 8bit is not installed")
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split("|") for row in page.splitlines() if re.match(r"\| `[^|]+` \| [24] \|", row)]
    assert len(rows) == 7
    for settings, *figures in rows:
        found = []
        for within in ("false", "true"):
            cfg = config.compose("train", [*settings.strip(" `").split(), f"update_in_backward={within}"])
            make = config.build(cfg.optimizer, _partial_=True)
            found.append(memory.UpdateBytes.of(make, UpdateOptions.of(config.plain(cfg))))
        after, within = found
        said = [after.weight, after.gradient, after.state, after.total, within.total]
        assert [float(figure) for figure in figures] == pytest.approx(said, abs=0.006), settings


def outline_of(*given):
    cfg = config.compose("train", given)
    return outline(config.network(cfg), config.plain(cfg), config.dtype(cfg.precision))


def kept(*given):
    cfg = config.compose("train", given)
    experts = config.experts(cfg)
    outlines = {
        name: outline(config.network(own), config.plain(own), config.dtype(cfg.precision))
        for name, own in experts.items()
    }
    options = UpdateOptions.of(config.plain(cfg))
    makers = {name: config.build(own.optimizer, _partial_=True) for name, own in experts.items()}
    updates = {name: memory.UpdateBytes.of(make, options) for name, make in makers.items()}
    return memory.standing(outlines, updates, offload=cfg.experts.offload)


def test_memory_of_14b():
    """Training every weight of a 14B model exceeds one card's memory, and training a LoRA does not."""
    whole = kept("model=t2v_a14b", "expert=low_noise", "adapter=none")
    count = 14_288_491_584  # docs/models.md
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * count, 4 * count, 8 * count)
    assert "too much for one card of 80 GiB (85.5 GB)" in whole.warning()
    lora = kept("model=t2v_a14b", "expert=low_noise", "adapter=lora")
    assert 2 * count < lora.weights < 2.1 * count and lora.warning() is None
    assert lora.warning(24 * 10**9) is not None
    pair = kept("model=t2v_a14b", "expert=both", "adapter=lora")
    waiting = kept("model=t2v_a14b", "expert=both", "adapter=lora", "experts.offload=cpu")
    assert pair.total == 2 * lora.total
    assert pair.total - waiting.total == lora.weights - lora.gradients, "the frozen weights of one are on the host"


def test_memory_of_small_updates():
    """A 14B expert's bytes under each way of updating, as arithmetic says: float32 parts 0.19 GB of elements."""
    count, fp32 = 14_288_491_584, 0
    given = ("model=t2v_a14b", "expert=low_noise", "precision=bf16", "trained.dtype=bf16")
    module = outline_of(*given)
    fp32 = sum(parameter.numel() for parameter in module.parameters() if parameter.dtype == torch.float32)
    assert 0.01 < fp32 / count < 0.02
    bf16 = kept(*given)
    assert bf16.weights == bf16.gradients == 2 * count + 2 * fp32
    assert bf16.optimizer == 8 * count, "moments in float32"
    assert kept(*given, "trained.rounding=kahan").optimizer == 10 * count
    assert kept(*given, "update_in_backward=true").gradients == 0
    small = kept(*given, "update_in_backward=true", "optimizer=adafactor")
    assert small.total < 1.05 * bf16.weights


#: Every kind of run of a published model, and a recipe whose data and weights are not there.
RUNS = [
    ("model=t2v_a14b", "expert=low_noise", "adapter=lora"),
    ("model=t2v_a14b", "expert=both", "adapter=none"),
    ("model=i2v_a14b", "expert=high_noise", "adapter=dora"),
    ("model=ti2v_5b", "expert=dense", "adapter=partial", "adapter.tags=[ffn]"),
    ("model=t2v_1_3b", "expert=dense", "adapter=lora", "epochs=2", "sample.every=10"),
    ("recipe=wan_tiny_i2v",),
    ("recipe=wan_tiny_vae",),
]


def refuse(*args, **kwargs):
    raise AssertionError("a dry run opens no weights")


@pytest.fixture
def sealed(monkeypatch):
    """A machine on which weights cannot be opened, and the hub cannot be reached."""
    for module, name in ((loading, "read_tensors"), (bases, "_fetch"), (subprocess, "run")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("given", RUNS, ids=lambda given: " ".join(given))
def test_dry_run_opens_nothing(given, call, tmp_path, sealed):
    """A dry run opens no weights and no network connection, and creates no file."""
    said = call("train.py", *given, "dry_run=true").stdout
    assert "is not there yet: what follows is for a clip of the model's own size" in said
    assert "samples per step" in said and "kept in memory" in said
    assert ("too much for one card" in said) == ("adapter=none" in given)
    assert said.count("trained parameters") == (2 if {"expert=both", "recipe=wan_tiny_i2v"} & set(given) else 1)
    assert not list(tmp_path.iterdir())


def test_dry_run_with_shards(tiny, call, tmp_path, sealed):
    """With existing shards, a dry run prints the steps and samples of the run."""
    given = (*tiny.train, "weights=owner/name", "adapter=lora", "adapter.rank=4", "batch_size=2", "epochs=1")
    said = call("train.py", *given, "dry_run=true").stdout
    clips = len(config.build(config.compose("train", given).data).train)
    steps = math.ceil(clips / 2)
    assert f"{steps}: {steps} x 2 = {2 * steps} samples" in said and f"{2 * steps} / {clips} clips" in said
    assert "not there yet" not in said and not list(tmp_path.iterdir())


def test_dry_run_parameters(tiny, pair, call, tmp_path):
    """The trained parameters that a dry run counts are those of a checkpoint."""
    given = (*tiny.train, f"weights={pair}", "adapter=lora", "adapter.rank=4", "batch_size=2", "steps=1", "run=r")
    said = call("train.py", *given, "dry_run=true").stdout
    call("train.py", *given)
    (file,) = tmp_path.rglob("adapter.safetensors")
    written = sum(tensor.numel() for key, tensor in load_file(file).items() if not key.endswith("alpha"))
    assert f"trained parameters  {written:,} of " in said


def test_dry_run_damaged_shards(tiny, call, tmp_path):
    """Damaged shards are an error in a dry run too."""
    shutil.copytree(tiny.latents, tmp_path / "latents")
    next((tmp_path / "latents").glob("latent-*.tar")).unlink()
    error = call("train.py", *tiny.train, "data.shards=latents", "dry_run=true", check=False).error
    assert "is missing; restore it" in error


def test_unreachable_shards(capsys):
    """Shards out of reach are reported with the reason, and the model's own clip size is used."""

    def out_of_reach():
        raise ValueError("https://nowhere/manifest.json cannot be read (no network)")

    settings = config.plain(config.compose("train", ["model=ti2v_5b", "expert=dense"]))
    clips = find_clips(["https://nowhere"], out_of_reach, settings)
    assert "cannot be read (no network): what follows" in capsys.readouterr().out
    assert clips.latent_shape(clips.commonest) == (31, 44, 78), "121 frames of 704x1248 behind strides 4 and 16"


def test_dry_run_engine_error(call, monkeypatch):
    """Settings that an engine cannot train are an error in a dry run too."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DeepSpeed holds one model per job" in call("train.py", "expert=both", "dry_run=true", check=False).error


MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
used = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which begins with what the process that started this one held.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print("\\nmeasured", used.ru_utime + used.ru_stime, int(peak) * 1024 / 1e9)
"""


@pytest.mark.slow
def test_dry_run_of_14b(environment, tmp_path):
    """A dry run of a 14B model takes less than 1 GB of memory and 40 s of processor time.

    Its processor time is bounded generously, for other work on this machine slows it too.
    """
    command = [sys.executable, "-c", MEASURED, str(config.ROOT / "train.py"), *RUNS[0], "dry_run=true"]
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    seconds, gigabytes = map(float, ended.stdout.split("measured")[1].split())
    assert seconds < 40 and gigabytes < 1, f"{seconds} s of processor time, {gigabytes} GB"
