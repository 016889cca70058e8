"""The log: whole lines only, cut back on resume, and valid JSON whatever the loss."""

import json

import torch

from wantrain.training.monitoring.metrics import Metrics


def test_a_loss_that_is_no_number_is_written_as_null(tmp_path):
    """NaN is no JSON; who reads the log with another language's parser must not stumble over it."""
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=10)
    metrics.add(1, {"loss": torch.tensor(0.5), "samples": 2, "grad_norm": torch.tensor(1.0)})
    metrics.add(2, {"loss": torch.tensor(float("nan")), "samples": 4, "grad_norm": float("inf")})
    metrics.flush()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0.5, 1.0), (None, None)]


def test_lines_after_the_checkpoint_and_half_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.9}\n{"step": 3, "lo')
    Metrics(path, steps=10).cut_back(1)
    assert path.read_text() == '{"step": 0}\n{"step": 1, "loss": 1.0}\n'
