"""Every engine trains as one process does, holds the precision of the model, and takes a run over from any other."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from engine_runs import BOUND, LORA, STEADY, STEPS, WHAT, difference, hold, measured

from wantrain import config
from wantrain.data import BatchSampler
from wantrain.models.formats.weights import read_file, read_tensors
from wantrain.training.engine import accelerator

ROOT = Path(__file__).resolve().parent.parent.parent.parent
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def test_stale_build_lock(tmp_path, monkeypatch):
    """A build lock that a killed process left is an error that names its file, and nobody waits for it.

    DeepSpeed builds its kernels at the first start under ZeRO; torch waits for the lock of a build without end.
    """
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    accelerator._refuse_stale_locks()
    lock.parent.mkdir(parents=True)
    lock.touch()
    accelerator._refuse_stale_locks()
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(ValueError, match=rf"{lock} is 60 minutes old: .* remove that file"):
        accelerator._refuse_stale_locks()


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        *((engine, "full") for engine in ENGINES if engine not in {"zero1", "zero3"}),  # one of ZeRO, which compiles
        *(pytest.param(engine, "full", marks=pytest.mark.slow) for engine in ("zero1", "zero3")),
        *(pytest.param(engine, "lora", marks=pytest.mark.slow) for engine in ENGINES),
        *(pytest.param(engine, "dora", marks=pytest.mark.slow) for engine in ("zero3", "fsdp2")),
        *(pytest.param(engine, "lokr", marks=pytest.mark.slow) for engine in ("ddp", "zero2", "fsdp2")),
        *(pytest.param("ddp", what, marks=pytest.mark.slow) for what in ("prodigy", "free")),
        pytest.param("zero3_offload", "full", marks=pytest.mark.slow),  # builds cpu_adam: a minute
        pytest.param("ddp", "pair", marks=pytest.mark.slow),
        pytest.param("fsdp2", "pair", marks=pytest.mark.slow),
    ],
)
def test_two_processes_match_one(engine, what, alone, tiny, pair, launch, tmp_path):
    """Fifty steps on two processes match those of one process within the bound, under every engine.

    The engine table of docs/numerics.md; WANTRAIN_WRITE_DOCS=1 writes what is measured into it.
    """
    ended = launch(engine, *tiny.train, f"weights={pair}", *WHAT[what], "run=two")
    assert ended.stdout.count(f"step {STEPS}/{STEPS}  loss") == 1, "only the main process speaks"
    run = tmp_path / "runs" / "two"
    if (engine, what) != ("zero3", "dora"):
        hold(engine, what, run, alone(what))
        return
    # Rounding that DeepSpeed's linear function alone makes moves a DoRA further than the bound: it is held against one
    # process with such a function, and less closely against one with torch's.
    hold(engine, what, run, alone(what, as_zero3=True))
    loss, moved = difference(run, alone(what))
    assert loss <= BOUND and moved <= 1e-4


@pytest.mark.slow
def test_hybrid_shards(tiny, pair, launch, call, tmp_path):
    """Two groups of two processes, each of which holds the whole in parts: fifty steps match those of one process. In
    bf16, with shared tokens, one process continues.
    """
    given = (*tiny.train, f"weights={pair}")
    launch("fsdp2_hybrid", *given, *WHAT["full"], "run=two", processes=4)
    call("train.py", *given, *WHAT["full"], "run=one")
    hold("fsdp2, hybrid", "full", tmp_path / "runs" / "two", tmp_path / "runs" / "one")
    bf16 = (*given, "batch_size=4", "precision=bf16", "ema=0.9", *STEADY)
    launch("fsdp2_hybrid", *bf16, "steps=2", "sequence_parallel=2", "run=moved", processes=4)
    call("train.py", *bf16, "steps=4", "run=moved")
    call("train.py", *bf16, "steps=4", "run=still")
    loss, moved = difference(tmp_path / "runs" / "moved", tmp_path / "runs" / "still")
    assert loss <= 1e-2 and moved <= 1e-3


FEW = (("ddp", 2), ("fsdp2", 2))
ALL = (
    ("single", 1),
    ("zero2", 2),  # DeepSpeed compiles a library at its first start: a minute and a half
    ("fsdp2", 2),
    ("ddp", 4),
    ("zero1", 2),
    ("fsdp2", 4),
    ("zero2", 4),
    ("single", 1),
    ("fsdp2", 2),
    ("ddp", 2),
)


@pytest.mark.parametrize("stations", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_resume_across_engines(stations, tiny, pair, launch, call, tmp_path):
    """A run that changes engine and number of processes matches a run on one process.

    Weights, moments, average and order carry over, whichever engine wrote the checkpoint.
    """
    command = (*tiny.train, f"weights={pair}", "batch_size=8", "ema=0.9", "checkpoint.keep=9", *STEADY)
    for count, (engine, processes) in enumerate(stations, 1):
        now = (*command, "run=moved", f"steps={2 * count}")
        if engine == "single":
            call("train.py", *now)
        else:
            said = launch(engine, *now, processes=processes).stdout
            assert f"step {2 * count - 2} of {2 * count}" in said
    call("train.py", *command, "run=still", f"steps={2 * len(stations)}")
    loss, moved = difference(tmp_path / "runs" / "moved", tmp_path / "runs" / "still")
    assert loss <= BOUND and moved <= BOUND
    state = [optimizer_state(tmp_path / "runs" / name, 2 * len(stations)) for name in ("moved", "still")]
    for key, value in state[1].items():
        assert torch.allclose(state[0][key], value, rtol=1e-3, atol=1e-9), key


@pytest.mark.slow
def test_resume_between_sharding_engines(tiny, pair, launch, call, tmp_path):
    """What two processes of ZeRO-3 or FSDP2 wrote together, four of another engine read, and one process does.

    The checkpoint is the one that a single process writes: the same files with the same names, shapes and dtypes.
    """
    command = (*tiny.train, f"weights={pair}", "batch_size=8", "checkpoint.keep=9", *STEADY)
    stations = (("zero3", 2, False), ("fsdp2", 4, True), ("zero3", 2, True), ("zero1", 2, True))
    for count, (engine, processes, background) in enumerate(stations, 1):
        how = (f"steps={2 * count}", "checkpoint.every=1", f"checkpoint.background={background}")
        launch(engine, *command, *how, "run=moved", processes=processes)
    call("train.py", *command, "run=moved", "steps=10")
    call("train.py", *command, "run=still", "steps=10", "checkpoint.every=1")
    loss, moved = difference(tmp_path / "runs" / "moved", tmp_path / "runs" / "still")
    assert loss <= BOUND and moved <= BOUND
    for step in range(2, 9):  # nine are kept
        folders = [tmp_path / "runs" / name / "checkpoints" / f"step_{step:06d}" for name in ("moved", "still")]
        described = [
            {
                (path.relative_to(folder).as_posix(), key): (value.shape, value.dtype)
                for path in folder.rglob("*.safetensors")
                for key, value in read_file(path)[0].items()
            }
            for folder in folders
        ]
        assert described[0] == described[1]
        state = [optimizer_state(tmp_path / "runs" / name, step) for name in ("moved", "still")]
        for key, value in state[1].items():
            assert torch.allclose(state[0][key], value, rtol=1e-3, atol=1e-9), (step, key)


CONSUMED = """
import json, os, runpy, sys
from pathlib import Path
from wantrain.data.loading import dataset

load = dataset.LatentData.load

def noted(self, samples, positions):
    with Path(f"consumed_{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
        file.write(json.dumps([[int(s), int(p)] for s, p in zip(samples, positions)]) + "\\n")
    return load(self, samples, positions)

dataset.LatentData.load = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_sample_order_across_processes(tiny, launch, tmp_path):
    """One, two and four processes consume exactly the samples of the plan.

    Each place in the run is taken once, by the sample that the plan has there: none is lost, none comes twice.
    """
    (tmp_path / "consumed.py").write_text(CONSUMED)
    command = (*tiny.train, "init=scratch", "batch_size=8", "accumulate=2", "check_expert=off", "run=r")
    for count, (engine, processes) in enumerate((("zero2", 1), ("ddp", 2), ("ddp", 4)), 1):
        launch(engine, ROOT / "train.py", *command, f"steps={2 * count}", script="consumed.py", processes=processes)
    files = sorted(tmp_path.glob("consumed_*.jsonl"))
    assert len(files) == 4, "four ranks in the end"
    consumed = [pair for file in files for line in file.read_text().splitlines() for pair in json.loads(line)]
    cfg = config.compose("train", [*command])
    plan = BatchSampler(config.build(cfg.data).buckets, batch_size=8, seed=0)
    wanted = [[int(sample), step * 8 + i] for step in range(6) for i, sample in enumerate(plan.batch(step))]
    assert sorted(consumed, key=lambda pair: pair[1]) == wanted


def optimizer_state(run, step):
    return read_file(run / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors")[0]


@pytest.mark.slow
def test_zero3_lora_resume(tiny, pair, launch, call, tmp_path):
    """ZeRO-3 resumes a LoRA run of one process, and one process resumes it from ZeRO-3, within the bound."""
    command = (*tiny.train, f"weights={pair}", *LORA[:1], "adapter=lora", "adapter.rank=3", *STEADY)
    call("train.py", *command, "run=moved", "steps=2")
    launch("zero3", *command, "run=moved", "steps=4")
    call("train.py", *command, "run=moved", "steps=6")
    call("train.py", *command, "run=still", "steps=6")
    loss, moved = difference(tmp_path / "runs" / "moved", tmp_path / "runs" / "still")
    assert loss <= BOUND and moved <= BOUND


SEEN = """
import json, os, runpy, sys
from pathlib import Path
import torch
import torch.distributed as dist
from wantrain.models import transformer
from wantrain.training.engine import accelerator as engines

seen, start = {}, engines.start_accelerator

def noted(*args, **how):
    accelerator = start(*args, **how)
    seen["engine"], seen["processes"] = engines.engine_of(accelerator), accelerator.num_processes
    return accelerator

def look(cls, name, key, about):
    inner = getattr(cls, name)
    def outer(self, *args, **kwargs):
        result = inner(self, *args, **kwargs)
        seen.setdefault(key, about(self, args, result))
        return result
    setattr(cls, name, outer)

def dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")

def block(self, args, result):
    x, time, context = args[:3]
    adapter = {n: dtype(p) for n, p in self.named_parameters() if "lora_A" in n}
    groups = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    seen["timeouts"] = [group.options._timeout.total_seconds() for group in groups]
    return {"residual": [dtype(x), dtype(result)], "time": dtype(time), "context": dtype(context),
            "modulation": dtype(self.modulation), "adapters": sorted(set(adapter.values()))}

def time(self, args, result):
    return {"timestep": dtype(args[0]), "value": args[0].flatten().tolist(), "tables": [dtype(t) for t in result]}

engines.start_accelerator = noted
look(transformer.Block, "forward", "block", block)
look(transformer.WanTransformer, "_time", "time", time)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    Path(f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
"""


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2", "zero3"))]
)
def test_precision_by_engine(engine, tiny, pair, launch, tmp_path):
    """Every engine keeps the model's own precision: float32 residuals, modulation, adapters and timesteps."""
    (tmp_path / "seen.py").write_text(SEEN)
    command = (*tiny.train, f"weights={pair}", "batch_size=2", "steps=2", "precision=bf16", "adapter=lora", "run=r")
    ended = launch(engine, ROOT / "train.py", *command, "check_expert=off", "safeguards.hang=7200", script="seen.py")
    assert ended.foreign == []
    timesteps = []
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert (seen["engine"], seen["processes"]) == (engine, 2)
        assert set(seen["timeouts"]) == {7200 + 300}, (
            "safeguards.hang and a little more, in the engine's own groups too"
        )
        assert len(seen["timeouts"]) >= (2 if engine.startswith("zero") else 1)
        assert seen["block"] == {
            "residual": ["float32", "float32"],
            "time": "float32",
            "context": "bfloat16",
            "modulation": "float32",
            "adapters": ["float32"],
        }
        assert seen["time"]["timestep"] == "float32" and seen["time"]["tables"] == ["float32", "float32"]
        timesteps += seen["time"]["value"]
    rounded = torch.tensor(timesteps).bfloat16().float().tolist()
    assert timesteps != rounded, "a timestep that bf16 could hold would be one that was rounded"
    assert timesteps == pytest.approx(drawn(2)), "and it is the one that was drawn"


def drawn(count):
    """The timesteps of a run's first samples, low noise, seed 0, as the loss draws them in one process."""
    from wantrain import flow
    from wantrain.util.seeds import generator_at

    distribution = {"density": "uniform", "shift": 3.0, "window": flow.NoiseWindow(0.0, 0.875)}
    streams = [generator_at(0, "noise", position) for position in range(count)]
    return [1000 * flow.draw_sigma(1, generator=stream, **distribution).item() for stream in streams]


@pytest.mark.slow
def test_pair_under_zero_refused(tiny, launch, tmp_path):
    """expert=both under ZeRO is one error that names the script for two jobs."""
    ended = launch("zero2", *tiny.train, "expert=both", "steps=2", "batch_size=8", check=False)
    assert "bash launch/pair.sh launch/accelerate/zero2.yaml" in ended.stderr and ended.returncode != 0
    assert (ROOT / "launch" / "pair.sh").is_file() and not (tmp_path / "runs").exists()


HYDRAS = {"gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "mixed_precision"}


def test_launch_files():
    """Launch files cover every engine, have CPU twins, and set nothing that belongs to the Hydra config."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "launch" / "accelerate").glob("*.yaml")}
    assert files.keys() == {
        "one_gpu", *(f"{cpu}{name}" for cpu in ("", "cpu_") for name in (*ENGINES, "zero3_offload", "fsdp2_hybrid"))
    }  # fmt: skip
    guide = (ROOT / "launch" / "README.md").read_text()
    for name, file in files.items():
        assert f"launch/accelerate/{name}.yaml" in guide, name
        assert file["mixed_precision"] == "no" and file["use_cpu"] is False
        inner = {**file.get("deepspeed_config", {}), **file.get("fsdp_config", {})}
        assert not HYDRAS & (inner.keys() | (file.keys() - {"mixed_precision"})), name
        twin = files.get(f"cpu_{name}")
        if twin:
            own = {key: file[key] for key in ("num_processes", "parallelism_config") if key in file}
            assert {**twin, **own} == file and twin["num_processes"] == (4 if name == "fsdp2_hybrid" else 2)


@pytest.mark.slow
def test_pair_script_under_zero(tiny, pair, environment, call, tmp_path):
    """launch/pair.sh trains two experts as two ZeRO jobs, and export makes one pipeline of both runs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "launch" / "pair.sh", ROOT / "launch" / "accelerate" / "cpu_zero2.yaml"]
    subprocess.run(
        [*command, *tiny.train, f"weights={pair}", "batch_size=8", "steps=3"],
        cwd=tmp_path, env={**environment, "PATH": path}, check=True, timeout=200,
    )  # fmt: skip
    call("export.py", "run=tiny_high_noise_none,tiny_low_noise_none", "out=pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_pair_export_and_sample(tiny, call, tmp_path):
    """Export and sampling read both experts of a pair run, and export takes the averaged weights."""
    call("train.py", *tiny.train, "init=scratch", "expert=both", "steps=4", "batch_size=2", "ema=0.5", "run=p")
    call("export.py", "run=p", "out=pipeline")
    for part, name in (("transformer", "high_noise"), ("transformer_2", "low_noise")):
        mine = read_tensors(tmp_path / "pipeline" / part)
        kept = tmp_path / "runs" / "p" / "checkpoints" / "step_000004" / name
        average, last = (read_tensors(folder / part) for folder in (kept / "ema", kept))
        assert all(torch.equal(mine[key], average[key]) for key in average)
        assert not all(torch.equal(average[key], last[key]) for key in average)
    call("sample.py", "run=p", "prompt=a red square", "steps=2", "model.num_frames=5", "out=s")
    assert list((tmp_path / "s").glob("*.mp4"))


@pytest.mark.parametrize(
    ("engine", "stands", "instead", "message"),
    [
        (
            "ddp",
            "mixed_precision: 'no'",
            "mixed_precision: bf16",
            "mixed_precision: bf16 (give precision= to train.py)",
        ),
        ("zero2", "zero_stage: 2", "gradient_clipping: 0.5", "gradient_clipping: 0.5 (give clip= to train.py)"),
        pytest.param(
            "fsdp2",
            "fsdp_version: 2",
            "fsdp_version: 1",
            "FSDP's first version is not supported",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_launch_file_clash_refused(engine, stands, instead, message, tiny, launch, tmp_path):
    """A launch file that sets an option of train.py, or FSDP's first version, is refused before the run starts."""
    mine = tmp_path / "mine.yaml"
    mine.write_text((ROOT / "launch" / "accelerate" / f"cpu_{engine}.yaml").read_text().replace(stands, instead))
    ended = launch(engine, *tiny.train, "steps=2", "batch_size=8", file=mine, check=False)
    assert ended.returncode != 0 and message in ended.stderr and not (tmp_path / "runs").exists()
    assert f"the launch file {mine}" in ended.stderr


@pytest.mark.parametrize("words", [("--config_file", "a file.yaml"), ("--config_file=a file.yaml",), ()])
def test_launch_file_name(words, tmp_path, monkeypatch):
    """The launch file is found in the launcher's command line, or in accelerate's stored default."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    command = [sys.executable, "-c", "print(flush=True); input()", "accelerate", "launch", *words, "train.py"]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        launcher.stdout.readline()  # from here on its command line is the one it was started with
        wanted = (
            "the launch file a file.yaml" if words else "the launcher (flags or environment, without a launch file)"
        )
        assert accelerator.launched_with(launcher.pid) == wanted
        if not words:
            (tmp_path / "accelerate").mkdir()
            stored = tmp_path / "accelerate" / "default_config.yaml"
            stored.touch()
            assert accelerator.launched_with(launcher.pid) == f"the launch file {stored} (accelerate's default)"
    finally:
        launcher.communicate(b"\n")


@pytest.mark.slow
def test_bf16_weights_under_ddp(tiny, pair, launch, call, tmp_path):
    """Two processes round bf16 weights alike, or the first step would end the run; losses are those of one process
    within what averaging gradients in bf16 changes."""
    given = (*tiny.train, f"weights={pair}", "batch_size=8", "steps=10", "precision=bf16", "trained.dtype=bf16")
    call("train.py", *given, "run=one")
    launch("ddp", *given, "run=two")
    one, two = (measured(tmp_path / "runs" / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) >= 10
    assert max(abs(two[key] - value) / value for key, value in one.items()) < 0.01
