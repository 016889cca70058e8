"""The log: whole lines only, cut back on resume, and a loss that is no number is never passed on to a checkpoint."""

import json

import pytest
import torch

from wantrain.training.metrics import Metrics


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), float("inf")), (0.5, float("nan"))])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path, loss, norm):
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=10)
    metrics.add(1, {"loss": torch.tensor(0.5), "samples": 2, "grad_norm": torch.tensor(1.0)})
    metrics.flush(speak=False)
    metrics.add(2, {"loss": torch.tensor(loss), "samples": 4, "grad_norm": torch.tensor(norm)})
    with pytest.raises(ValueError, match=rf"loss is {loss} at step 2.*the last checkpoint is good"):
        metrics.flush(speak=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1]


def test_lines_after_the_checkpoint_and_half_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.9}\n{"step": 3, "lo')
    Metrics(path, steps=10).cut_back(1)
    assert path.read_text() == '{"step": 0}\n{"step": 1, "loss": 1.0}\n'
