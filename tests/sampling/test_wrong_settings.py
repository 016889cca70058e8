"""Sampling done wrong shows in what the judge sees, as far as wan-tiny can show it (docs/numerics.md has the figures)."""

import pytest

from wantrain import config
from wantrain.demo.judge import judge, scores, spared_scenes
from wantrain.geometry import Bucket
from wantrain.models import Base
from wantrain.sampling import Experts, Settings
from wantrain.sampling.build import build_sampler

SCENES = spared_scenes(40)
BATCH = 20


@pytest.fixture(scope="module")
def judged():
    """judged(swap=..., shift=..., guidance=...): the judge's scores of wan-tiny's samples, in four steps each."""
    cfg = config.compose("sample")
    base = Base(config.ROOT / "assets" / "wan-tiny")
    models = {name: base.transformer(name) for name in cfg.model.experts}
    sampler = build_sampler(models, boundary=cfg.model.boundary, base=base)
    prompts = [scene.caption(language) for scene, language in SCENES]
    sampler.warm([*prompts, ""])

    def score(*, swap=False, shift=cfg.model.shift, guidance=2.0):
        high, low = models["high_noise"], models["low_noise"]
        own = {"high_noise": low, "low_noise": high} if swap else models
        sampler.experts = Experts(own, cfg.model.boundary)
        settings = Settings(dict.fromkeys(models, guidance), shift, steps=4)
        clips = []
        for first in range(0, len(prompts), BATCH):
            some = prompts[first : first + BATCH]
            seeds = range(first, first + len(some))
            clips += sampler.batch(some, bucket=Bucket(17, 64, 64), settings=settings, seeds=seeds)
        return scores([judge(clip) for clip in clips], [scene for scene, _ in SCENES])

    return score


@pytest.mark.slow
def test_judge_detects_wrong_settings(judged, capsys):
    """Swapped experts and a wrong shift lower the judge's score; missing guidance does not raise it."""
    ways = {
        "right": {},
        "swapped experts": {"swap": True},
        "no guidance": {"guidance": 1.0},
        "shift 1": {"shift": 1.0},
        "shift 100": {"shift": 100.0},
    }
    found = {name: judged(**how) for name, how in ways.items()}
    with capsys.disabled():
        for name, told in found.items():
            print(f"\n{name:16} " + "  ".join(f"{what} {value:.1%}" for what, value in told.items()), end="")
    right = found["right"]["all"]
    assert right > 0.9
    assert found["swapped experts"]["all"] < right - 0.3
    assert found["shift 100"]["all"] < right - 0.1
    assert found["no guidance"]["all"] <= right, "one clip of forty: wan-tiny hardly needs guidance"
    assert abs(found["shift 1"]["all"] - right) < 0.06, "so small a model forgives that; if not, the figures are old"
