"""The log: whole lines only, cut back on resume, and valid JSON whatever the loss."""

import json

import torch

from wantrain.training.monitoring.metrics import Metrics


def test_nan_is_logged_as_null(tmp_path):
    """A NaN or infinite value is written as null: JSON has no NaN, and parsers of other languages refuse it."""
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=10)
    metrics.add(1, {"loss": torch.tensor(0.5), "samples": 2, "grad_norm": torch.tensor(1.0)})
    metrics.add(2, {"loss": torch.tensor(float("nan")), "samples": 4, "grad_norm": float("inf")})
    metrics.flush()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0.5, 1.0), (None, None)]


def test_cut_back(tmp_path):
    """Log lines after the checkpoint's step, and incomplete lines, are cut."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.9}\n{"step": 3, "lo')
    Metrics(path, steps=10).cut_back(1)
    assert path.read_text() == '{"step": 0}\n{"step": 1, "loss": 1.0}\n'
