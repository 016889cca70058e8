"""What validation and previews took is logged as a share of training, and a validation beyond its share is reported."""

import pytest

from wantrain.training.monitoring.costs import Costs


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


class Takes:
    """A hook that takes so many seconds."""

    def __init__(self, clock, seconds, kind="validation", every=100):
        self.clock, self.seconds, self.kind, self.every = clock, seconds, kind, every

    def __call__(self, step):
        self.clock.now += self.seconds
        return {"validation_loss": 1.0}


@pytest.mark.parametrize(("seconds", "share", "told"), [(1.4, 0.1, False), (1.6, 0.1, True), (1.6, None, False)])
def test_share(seconds, share, told, capsys):
    """Steps of 0.1 s, a validation every hundred: its share is over training alone; step 0 has none."""
    clock = Clock()
    costs, hook = Costs(share, clock), Takes(clock, seconds)
    shares = []
    for step in (0, 100, 200, 300, 350):
        costs.training = 0.1 * step
        found = costs.timed(hook, step)
        assert found["cost/validation_seconds"] == pytest.approx(seconds) and found["validation_loss"] == 1.0
        shares.append(found.get("cost/validation_share"))
    assert shares == [None, *[pytest.approx(seconds / 10)] * 3, None]
    said = capsys.readouterr().out
    assert said.count("validation has taken") == told and (not told or "step 200: validation has taken 16% of" in said)


def test_kinds():
    """Previews are counted apart, and the validations of two experts together."""
    clock = Clock()
    costs = Costs(0.1, clock, training=20.0)
    assert costs.timed(Takes(clock, 1.0), 100)["cost/validation_share"] == pytest.approx(0.05)
    second = costs.timed(Takes(clock, 2.0), 100)
    assert (second["cost/validation_seconds"], second["cost/validation_share"]) == (
        pytest.approx(3.0),
        pytest.approx(0.15),
    )
    assert costs.timed(Takes(clock, 5.0, "preview", every=50), 100)["cost/preview_share"] == pytest.approx(0.25)
