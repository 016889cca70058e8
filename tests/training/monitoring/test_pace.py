"""Which process the others wait for: said once, with the part of the step that is slow."""

from types import SimpleNamespace

import pytest
import torch

from wantrain.training.monitoring import pace
from wantrain.training.monitoring.pace import Pace, Waiting


def test_slowest():
    """The others' wait is its own time less their mean, as a share of a step."""
    rows = torch.tensor([[0.1, 0.3, 2.0], [0.9, 0.3, 2.0], [0.1, 0.5, 2.0]], dtype=torch.float64)
    found = Waiting.of(rows)
    assert found.process == 1 and found.own == (0.9, 0.3) and found.others == pytest.approx(0.5)
    assert found.share == pytest.approx((1.2 - 0.5) / 2.0)


def steps(data, forward, total, count=3):
    return [SimpleNamespace(seconds=lambda: {"data": data, "forward": forward, "rest": total - data - forward})] * count


@pytest.fixture
def report(monkeypatch):
    """report(pace, mine, others): at a line of the log, where the others' rows are these."""
    monkeypatch.setattr(pace, "host_of", lambda rank: f"node{rank}")

    def run(mine, others, *, together=False):
        stepper = SimpleNamespace(
            processes=1 + len(others),
            forwards_together=together,
            device="cpu",
            gather=lambda row: torch.cat([row, torch.tensor(others, dtype=row.dtype)]),
        )
        return mine.report(stepper)

    return run


def filled(mine, *parts):
    for each in steps(*parts):
        mine.add(each)
    return mine


def test_said_once(report, capsys):
    """A slow process is named once with its machine, and again only after it was as fast as the others."""
    mine = filled(Pace(), 0.1, 0.2, 1.0)
    slow, equal = [[0.7, 0.2, 1.0], [0.1, 0.2, 1.0]], [[0.1, 0.2, 1.0]] * 2
    assert report(mine, slow) == {"slowest/process": 1, "slowest/share": pytest.approx(0.6)}
    said = capsys.readouterr().out
    assert said.startswith(
        "warning: process 1 on node1 is slower than the others: of each step it takes 0.7 s for data"
    )
    assert "0.2 s for forward before it meets them, they 0.3 s. They wait for it, 60% of a step" in said
    report(filled(mine, 0.1, 0.2, 1.0), slow)
    report(filled(mine, 0.1, 0.2, 1.0), [[0.25, 0.2, 1.0], [0.1, 0.2, 1.0]])
    assert capsys.readouterr().out == ""
    report(filled(mine, 0.1, 0.2, 1.0), equal)
    report(filled(mine, 0.1, 0.2, 1.0), slow)
    assert capsys.readouterr().out.count("warning") == 1


def test_what_counts(report):
    """The first step of a start does not count, nor forward where processes meet in it; one process compares nothing."""
    mine = Pace()
    mine.add(steps(9.0, 9.0, 20.0)[0])
    assert report(filled(mine, 0.1, 0.6, 1.0), [[0.1, 0.2, 1.0]]) == {
        "slowest/process": 0,
        "slowest/share": pytest.approx(0.4),
    }
    filled(mine, 0.1, 0.6, 1.0)
    assert report(mine, [[0.1, 0.0, 1.0]], together=True)["slowest/share"] == pytest.approx(0.0)
    assert report(filled(mine, 0.1, 0.2, 1.0), []) == {} and mine.steps == []
    assert report(mine, [[0.1, 0.0, 1.0]]) == {}, "no step since the last line"
