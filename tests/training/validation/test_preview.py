"""Previews: what a run leaves to look at, that it plays in a browser without a network, and that memory is given back.

That losses stay the same is held by tests/commands/test_resume.py.
"""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import wandb
from torch._subclasses.fake_tensor import FakeTensor

from wantrain import page
from wantrain.demo.judge import wug_scenes
from wantrain.models import Base, WanTransformer
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.trackers import NoTracker, PreviewClip, build_tracker
from wantrain.training.validation import build
from wantrain.training.validation.preview import Preview, PreviewRequest, write_history
from wantrain.video import write_mp4

PROMPTS = ["a red ring", "一只猫 🐈 <b>"]
SEEN = ("sample.every=2", "sample.prompts=p.txt", "sample.steps=2", "model.num_frames=5", "batch_size=2")


@pytest.fixture
def previewed(tiny, pair, call, tmp_path):
    """previewed("steps=4"): a micro run of the low-noise expert with previews every two steps."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), encoding="utf-8")

    def run(*more, weights=pair):
        return call("train.py", *tiny.train, f"weights={weights}", *SEEN, "run=r", *more)

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_preview_page(previewed, tmp_path):
    """The page of a run shows the previews of all its starts."""
    run = tmp_path / "runs" / "r"
    previewed("steps=2", "optimizer.lr=1e-2")
    previewed("steps=4", "optimizer.lr=1e-2")  # goes on, and the page with it
    data = page.data_of((run / "index.html").read_text(encoding="utf-8"))
    assert data["previews"]["steps"] == [0, 2, 4] and data["state"] == "finished" and data["step"] == 4
    shown = {
        row["prompt"]: {int(step): video["file"] for step, video in row["videos"].items()}
        for row in data["previews"]["rows"]
    }
    wanted = {
        prompt: {step: f"samples/step_{step:06d}_{n}.mp4" for step in (0, 2, 4)} for n, prompt in enumerate(PROMPTS)
    }
    assert shown == wanted and all((run / file).is_file() for row in shown.values() for file in row.values())
    assert (run.parent / "index.html").is_file(), "the page of all runs"
    assert [path.name for path in sorted((run / "samples").glob("*.png"))] == [f"step_00000{i}.png" for i in (0, 2, 4)]
    history = rows(run / "samples" / "previews.jsonl")
    assert [(row["step"], row["number"]) for row in history] == [(s, n) for s in (0, 2, 4) for n in (0, 1)]
    logged = {row["step"]: row for row in rows(run / "metrics.jsonl") if "preview_motion" in row}
    for step in (0, 2, 4):
        own = [row for row in history if row["step"] == step]
        for what in ("motion", "flicker"):
            assert logged[step][f"preview_{what}"] == pytest.approx(sum(row[what] for row in own) / 2)


def test_previews_are_judged(tmp_path):
    """The log has the share of previews that show what their prompt says, of those that the judge can read."""
    (moving, _), (other, _) = wug_scenes(2)
    clip = replace(moving, speed=0.5).frames(64, 64, fps=16, num_frames=17)
    sizes = {"bucket": None, "inputs": None}
    requests = [PreviewRequest(prompt, **sizes) for prompt in (moving.caption(), other.caption(), "a cat")]
    preview = Preview([], None, None, requests, 16, 0, 1, 1, tmp_path / "samples", NoTracker(), {})
    preview.folder.mkdir()
    assert preview._show(1, [clip] * 3)["preview_right"] == 0.5
    preview.requests = requests[2:]
    assert "preview_right" not in preview._show(1, [clip])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_preview_matches_sample(precision, previewed, call, tmp_path):
    """A preview is the video that sample.py makes of the checkpoint, bit for bit.

    The expert in training computes in the run's precision, the other one as it is loaded, the VAE in float32.
    """
    previewed("steps=2", "optimizer.lr=1e-2", f"precision={precision}")
    size = ("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32")
    for number, prompt in enumerate(PROMPTS):
        how = (f"prompt={prompt}", f"seed={number}", "num_frames=5", "steps=2", f"precision={precision}")
        call("sample.py", "run=r", *size, *how)
        (theirs,) = (tmp_path / "samples").glob(f"*_seed_{number}_*.mp4")
        mine = tmp_path / "runs" / "r" / "samples" / f"step_000002_{number}.mp4"
        assert mine.read_bytes() == theirs.read_bytes(), number


def test_previews_after_rollback(tmp_path):
    """Previews of later steps are dropped when a run goes back to an earlier step."""

    def clip(number):
        return PreviewClip(number, PROMPTS[number], number, tmp_path / f"{number}.mp4", 1.0, 0.5)

    path = tmp_path / "previews.jsonl"
    for step in (0, 2, 4):
        write_history(path, step, [clip(0), clip(1)])
    write_history(path, 2, [clip(0)])
    assert [(row["step"], row["number"], row["file"]) for row in rows(path)] == [
        (0, 0, "0.mp4"),
        (0, 1, "1.mp4"),
        (2, 0, "0.mp4"),
    ]


def bytes_alive():
    """Bytes of all tensors that Python can reach, each storage once; fake ones, of other tests, have none."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("offload", ["disk", pytest.param("cpu", marks=pytest.mark.slow)])
def test_preview_memory(offload, previewed, monkeypatch):
    """Memory returns to its level after a preview; only the prompts' embeddings stay."""
    build_evaluations, levels = build.build_evaluations, []

    def watching(*args, **how):
        made = build_evaluations(*args, **how)
        preview = made.hooks[-1]
        call = type(preview).__call__

        def clip(self, step):
            before = bytes_alive()
            result = call(self, step)
            levels.append((before, bytes_alive(), sum(text.nbytes for text in self.texts.values())))
            return result

        monkeypatch.setattr(type(preview), "__call__", clip)
        return made

    monkeypatch.setattr(build, "build_evaluations", watching)
    previewed("steps=4", f"sample.offload.experts={offload}")
    assert len(levels) == 3
    (before, after, texts), *later = levels
    assert 0 <= after - before <= texts + 4096, "the prompts' embeddings are all that stays"
    for before, after, same in later:
        assert abs(after - before) <= 4096 and same == texts


def test_missing_expert(tiny, capsys):
    """A missing expert is reported once, with the expert that replaces it in the preview."""
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 64, "ffn_dim": 32, "num_layers": 1}
    stepper = SimpleNamespace(device=torch.device("cpu"), module=WanTransformer(**size))
    model = {"experts": ["high_noise", "low_noise"], "boundary": 0.875, "conditioning": "none"}
    settings = {"model": model, "sample": {"offload": {"experts": "disk", "blocks": False}}, "init": "base"}
    placement = SimpleNamespace(device=torch.device("cpu"))
    setup = SimpleNamespace(settings=settings, base=Base(tiny.base), dtype=torch.float32, placement=placement)
    open_sampler = build.preview_sampler(setup, {"low_noise": SimpleNamespace(stepper=stepper)})
    for _ in range(2):
        with open_sampler() as sampler:
            assert [sampler.experts.name_at(timestep) for timestep in (999, 10)] == ["low_noise"] * 2
    said = capsys.readouterr().out
    assert said.count(f"{tiny.base} holds no high_noise, so low_noise answers for every noise level") == 1


def test_wandb_offline(tmp_path, monkeypatch):
    """W&B offline leaves the videos and a table per prompt in the run folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    wandb.teardown()  # what another test has set up
    frames = torch.randint(0, 255, (5, 16, 16, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=4)
    metrics.tracker = build_tracker("wandb", project="p", run="r", folder=tmp_path, config={})
    contents = set()
    for step in (0, 2):
        clips = []
        for number, prompt in enumerate(PROMPTS):
            file = tmp_path / "samples" / f"step_{step}_{number}.mp4"
            write_mp4(file, frames + step + number, 16)
            contents.add(file.read_bytes())
            clips.append(PreviewClip(number, prompt, number, file, 1.5, 0.25))
        metrics.tracker.previews(step, clips)  # before the scalars of the steps that came before
        metrics.add(step, {"loss": 1.0, "samples": 2, "grad_norm": 1.0})
        metrics.annotate(step, {"preview_motion": 1.5})
        metrics.flush(speak=False)
    metrics.tracker.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert {path.read_bytes() for path in run.rglob("*.mp4")} == contents and len(contents) == 4
    # What W&B shows of tables are artifacts; they wait for their upload in the run folder too, each video once.
    staged = [path.read_bytes() for path in (tmp_path / "wandb" / "artifacts" / "staging").iterdir()]
    assert sorted(content for content in staged if content in contents) == sorted(contents)
    tables = [json.loads(content) for content in staged if content.startswith(b'{"_type": "table"')]
    shown = sorted({(row[2], row[0], row[4], row[5], row[1]["_type"]) for table in tables for row in table["data"]})
    assert shown == [(prompt, step, 1.5, 0.25, "video-file") for prompt in sorted(PROMPTS) for step in (0, 2)]


def test_wandb_step_order():
    """Scalars of earlier steps are logged before a preview.

    W&B drops what is logged for an earlier step than its last.
    """
    from wantrain.training.monitoring.trackers import WandbTracker

    logged = []

    class Run:
        def log(self, values, step):
            assert not logged or step >= logged[-1][0], "W&B would drop this"
            logged.append((step, sorted(values)))

        def finish(self, exit_code):
            logged.append((99, []))

    class Wandb:
        Video = staticmethod(lambda *args, **how: "video")

        class Table:
            def __init__(self, **how):
                self.rows = []

            def add_data(self, *row):
                self.rows.append(row)

    tracker = WandbTracker.__new__(WandbTracker)
    tracker.wandb, tracker.run, tracker.waiting, tracker.tables = Wandb, Run(), {}, {}
    clip = PreviewClip(0, "p", 0, None, 1.0, 0.0)
    for step in (0, 10, 12):
        tracker.previews(step, [clip])
    for step in (0, 8, 9, 10, 11):
        tracker.scalars(step, {"loss": 1.0})
    tracker.close()
    media = ["previews/0", "samples/0"]
    assert logged == [(0, ["loss", *media]), (8, ["loss"]), (9, ["loss"]), (10, ["loss", *media]), (11, ["loss"]),
                      (12, media), (99, [])]  # fmt: skip
    assert [row[0] for row in tracker.tables[0].rows] == [0, 10, 12]
