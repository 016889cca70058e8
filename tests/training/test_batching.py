"""Batching: how a step's samples are shared out, by hand-made numbers and by enumeration."""

import pytest
import torch

from wantrain import config
from wantrain.training.batching import Batching
from wantrain.training.planning.estimate import chosen
from wantrain.util.distributed import DataRanks


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "micro_batch", "processes", "shared"),
    [
        (8, None, 1, 1, (1, 8, 1)),
        (8, None, 1, 8, (1, 1, 8)),
        (8, None, 3, 1, (2, 4, 1)),  # not 3: it does not divide
        (6, None, 4, 1, (3, 2, 1)),
        (16, None, None, 1, (16, 1, 1)),
        (16, None, None, 4, (4, 1, 4)),
        (8, 2, 1, 2, (2, 2, 2)),  # as given, whatever the model's default
    ],
)
def test_batching(batch_size, accumulate, micro_batch, processes, shared):
    """Samples of a step are divided into passes, accumulation and processes as computed by hand."""
    found = Batching.of(batch_size, accumulate=accumulate, micro_batch=micro_batch, processes=processes)
    assert (found.micro, found.accumulate, found.processes) == shared
    assert found.batch_size == batch_size


def test_shared_tokens():
    """Processes that share the tokens of a clip count as one when samples are shared out."""
    found = Batching.of(8, accumulate=None, micro_batch=1, processes=8, sequence_parallel=4)
    assert (found.micro, found.accumulate, found.batch_size) == (1, 4, 8)
    assert str(found) == "1 per backward x 4 accumulation x 8 processes / 4 that share each clip"


def test_data_ranks(monkeypatch):
    """Neighbours get the same samples, and of what they gather one of them counts."""
    monkeypatch.setenv("WORLD_SIZE", "6")
    found = []
    for rank in range(6):
        monkeypatch.setenv("RANK", str(rank))
        found.append((DataRanks(2).rank, DataRanks(2).count, DataRanks().rank))
    assert found == [(0, 3, 0), (0, 3, 1), (1, 3, 2), (1, 3, 3), (2, 3, 4), (2, 3, 5)]
    gathered = torch.arange(6).repeat_interleave(2)  # two rows of each process
    assert DataRanks(2).once(gathered).tolist() == [0, 0, 2, 2, 4, 4] and DataRanks().once(gathered) is gathered


def test_fewest_passes():
    """Batching takes the smallest number of passes that the micro-batch allows."""
    for batch_size in range(1, 41):
        for most in range(1, 12):
            found = Batching.of(batch_size, accumulate=None, micro_batch=most, processes=1)
            assert found.micro * found.accumulate == batch_size and found.micro <= most
            fewer = range(1, found.accumulate)
            assert all(batch_size % passes or batch_size // passes > most for passes in fewer)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "words"),
    [
        (6, 4, 1, "batch_size=6 must divide by accumulate x processes = 4 x 1; the nearest are 4 and 8"),
        (8, None, 3, "batch_size=8 must divide by processes = 3; the nearest are 6 and 9"),
        (2, None, 4, "batch_size=2 must divide by processes = 4; the nearest are 4 and 8"),
    ],
)
def test_indivisible_batch_refused(batch_size, accumulate, processes, words):
    """A batch size that cannot be divided is an error that names the nearest sizes."""
    with pytest.raises(ValueError) as caught:
        Batching.of(batch_size, accumulate=accumulate, micro_batch=1, processes=processes)
    assert str(caught.value) == words


@pytest.mark.parametrize("model", ["t2v_a14b", "i2v_a14b", "t2v_14b", "ti2v_5b", "t2v_1_3b"])
def test_published_model_defaults(model):
    """A published model computes one sample at a time and recomputes its blocks.

    This fits the card it is meant for: of a 14B, two samples or kept activations do not.
    """
    cfg = config.compose("train", [f"model={model}", "adapter=lora"])
    alone = config.batching(cfg, 1)
    assert (alone.micro, cfg.recompute) == (1, "block")
    assert config.batching(cfg, 8).accumulate == 1, "on a node of eight each takes one"
    said = chosen(config.plain(cfg), alone)
    assert said == (
        f"batch 8 = 1 per backward x 8 accumulation x 1 process, blocks recomputed (defaults of model={model})"
    )


def test_given_batching():
    """A value that the user gives is not reported as a default."""
    for given in ("batch_size=4", "accumulate=1", "recompute=block"):
        cfg = config.compose("train", [given])
        assert "defaults" not in chosen(config.plain(cfg), config.batching(cfg, 1)), given
    tiny = config.compose("train")
    assert chosen(config.plain(tiny), config.batching(tiny, 1)).startswith(
        "batch 16 = 16 per backward x 1 accumulation"
    )
