"""Waits for shards: what is logged and said, against figures by hand."""

import pytest

from wantrain.data.remote import Traffic
from wantrain.training.monitoring.supply import Supply


def test_waits(capsys):
    """100 steps of 100 s with 12 s of waiting, while 4 GB came: 40 MB/s, where 45 are needed."""
    now = [Traffic("s3://bucket/latents", 1000, 1.0)]
    supply = Supply(lambda: now)
    for number in range(1, 11):
        now[0] = Traffic("s3://bucket/latents", 1000 + number * 400_000_000, 1.0 + number * 2.0)
        row = supply.report(10, 10.0, 1.2)
        assert row == pytest.approx(
            {"data/wait": 1.2, "data/mb_per_second": 40, "data/mb_per_second_needed": 400 / 8.8}
        )
    supply.report(10, 10.0, 1.2)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "waited 12% of the last 10 steps for s3://bucket/latents: 40 MB/s came, 45.5 MB/s are needed"
    )
    assert last.startswith(
        "waited 12% of the last 100 steps for s3://bucket/latents: 40 MB/s came, 45.5 MB/s are needed"
    )


def test_no_waits(capsys):
    """Steps that wait for another reason, and data on a disk, say nothing."""
    supply = Supply(lambda: [Traffic("s3://bucket/latents", 0, 0.0)])
    assert supply.report(10, 10.0, 5.0)["data/wait"] == 0
    assert Supply(list).report(10, 10.0, 5.0) == {}
    assert capsys.readouterr().out == ""
