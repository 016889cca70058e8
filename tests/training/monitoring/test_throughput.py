"""What the log says about speed adds up, and the losses by noise are those of the samples."""

import json

import pytest
import torch

from wantrain import config
from wantrain.losses import FlowMatching
from wantrain.models.flops import training_flops
from wantrain.training.monitoring import throughput

RUN = ("init=scratch", "batch_size=4", "steps=20", "run=r", "checkpoint.every=10", "accumulate=2")
PARTS = ("data", "forward", "backward", "optimizer", "communication", "rest")


def rows_of(tmp_path, name="r"):
    rows = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_step_metrics(tiny, call, tmp_path, monkeypatch):
    """The metrics of a step add up.

    Times add up to its seconds, tokens and operations follow the batch's shape, losses by noise cover all samples.
    """
    drawn, loss = [], FlowMatching.__call__

    def noted(self, model, batch, draws):
        record = loss(self, model, batch, draws)
        drawn.append((batch, record.sigma, record.per_sample))
        return record

    monkeypatch.setattr(FlowMatching, "__call__", noted)
    ended = call("train.py", *tiny.train, *RUN, "optimizer.lr=1e-3")
    rows = rows_of(tmp_path)
    assert len(rows) == 20
    for row in rows[1:]:
        parts = [row[f"time/{part}"] for part in PARTS]
        assert all(part >= 0 for part in parts) and sum(parts) <= row["seconds"] * 1.001
    assert sum(sum(row[f"time/{part}"] for part in PARTS) for row in rows[1:9]) > 0.5 * sum(
        row["seconds"] for row in rows[1:9]
    ), "most of the time of steps without a save is accounted for"
    cfg = config.compose("train", list(tiny.train))
    module = config.build(cfg.model.transformer)
    for row, first in zip(rows, range(0, 40, 2), strict=True):
        batches = [batch for batch, _, _ in drawn[first : first + 2]]
        shapes = [batch.latents_BCTHW.shape for batch in batches]
        tokens = [t * h * w // 4 for _, _, t, h, w in shapes]
        assert row["tokens"] == sum(2 * each for each in tokens)
        assert row["video_seconds"] == pytest.approx(sum(2 * (4 * shape[2] - 3) / 16 for shape in shapes))
        wanted = [
            2 * training_flops(module, tokens=each, text_rows=batch.text_BLD.shape[1] + 1).model
            for each, batch in zip(tokens, batches, strict=True)
        ]
        assert row["flops"] == sum(wanted)
        assert row["lr"] == pytest.approx(1e-3 * row["lr_scale"])
    told = [row for row in rows if "tokens_per_second" in row]
    assert [row["step"] for row in told] == [10, 20]
    for row, some in zip(told, (rows[:10], rows[10:]), strict=True):
        seconds = sum(each["seconds"] for each in some)
        assert row["tokens_per_second"] == pytest.approx(sum(each["tokens"] for each in some) / seconds)
        assert row["tflops"] == pytest.approx(sum(each["flops"] for each in some) / seconds / 1e12)
        assert row["host_gb"] > 0.1 and 0 < row["update_ratio"] < 0.1
        sigma = torch.cat([sigma for _, sigma, _ in drawn[2 * some[0]["step"] - 2 : 2 * some[-1]["step"]]])
        errors = torch.cat([error for *_, error in drawn[2 * some[0]["step"] - 2 : 2 * some[-1]["step"]]])
        for middle, mean in row["loss_by_sigma"].items():
            inside = (sigma - float(middle)).abs() <= 0.875 / 16
            assert mean == pytest.approx(errors[inside].mean().item(), rel=1e-5)
    assert "tokens/s" in ended.stdout and rows[10]["save_seconds"] > 0


def test_update_norm(tiny, call, tmp_path):
    """The logged update norm is the norm of the weights' change between the checkpoints around step 10."""
    from wantrain.models.formats.weights import read_tensors

    call("train.py", *tiny.train, *RUN, "checkpoint.every=1", "checkpoint.keep=30", "validation.every=1000")
    folder = tmp_path / "runs" / "r" / "checkpoints"
    before, after = (read_tensors(folder / f"step_{step:06d}" / "transformer_2") for step in (9, 10))
    change = torch.stack([(after[key] - before[key]).double().square().sum() for key in after]).sum().sqrt().item()
    (row,) = (row for row in rows_of(tmp_path) if row["step"] == 10)
    assert row["update_norm"] == pytest.approx(change, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A40", 149.7),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A100X", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4060", None),
        ("Quadro RTX 6000", None), ("Tesla V100-SXM2-16GB", None), ("AMD Instinct MI300X", None),
    ],
)  # fmt: skip
def test_peak_flops(name, tera, monkeypatch):
    """A listed card has the peak of its data sheet for dense bfloat16.

    A card that is not listed has none, whatever card its name resembles.
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.peak_of(torch.device("cuda")) == (None if tera is None else tera * 1e12)
    assert throughput.peak_of(torch.device("cpu")) is None
