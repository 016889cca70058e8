"""Processes that share the tokens of each clip train as one process does, under every engine."""

import json

import pytest
from engine_runs import STEPS, WHAT, hold


@pytest.mark.parametrize(
    ("engine", "processes", "shared_by", "what"),
    [
        ("ddp", 2, 2, "full"),
        pytest.param("ddp", 4, 2, "full", marks=pytest.mark.slow),  # two that share, twice
        pytest.param("ddp", 3, 3, "full", marks=pytest.mark.slow),  # of four heads: keys and values are gathered
        pytest.param("ddp", 2, 2, "lora", marks=pytest.mark.slow),
        pytest.param("ddp", 2, 2, "pair", marks=pytest.mark.slow),
        pytest.param("zero2", 2, 2, "full", marks=pytest.mark.slow),
        pytest.param("zero3", 2, 2, "full", marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, 2, "full", marks=pytest.mark.slow),
    ],
)
def test_shared_tokens_match_one(engine, processes, shared_by, what, alone, tiny, pair, launch, tmp_path):
    """The same where processes share the tokens of each clip, in validation and previews too."""
    shared = (f"sequence_parallel={shared_by}", "run=two")
    launch(engine, *tiny.train, f"weights={pair}", *WHAT[what], *shared, processes=processes)
    run = tmp_path / "runs" / "two"
    one = alone(what)
    rows = [[json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (run, one)]
    counted, wanted = ([row["tokens"] for row in own if "tokens" in row] for own in rows)
    assert counted == wanted and len(wanted) == STEPS, "a clip counts once"
    assert json.loads((run / "run.json").read_text())["starts"][0]["sequence_parallel"] == shared_by
    hold(f"{engine}, {'tokens shared' if shared_by == 2 else 'keys gathered'}", what, run, one)
