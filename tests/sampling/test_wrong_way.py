"""Sampling done wrong shows: the judge tells swapped experts, a wrong shift and missing guidance from the right way."""

import pytest
import torch

from wantrain import config
from wantrain.data import judge, scores, spared_scenes
from wantrain.geometry import Bucket
from wantrain.models import Base
from wantrain.sampling import Experts, Settings
from wantrain.training.gather import build_sampler

SCENES = spared_scenes(40)
BATCH = 20


@pytest.fixture(scope="module")
def judged():
    """judged(swap=..., shift=..., guidance=...): the mean score (colour, shape, direction) of wan-tiny's samples."""
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
        settings = Settings(dict.fromkeys(models, guidance), shift, steps=cfg.steps)
        clips = []
        for first in range(0, len(prompts), BATCH):
            some = prompts[first : first + BATCH]
            seeds = range(first, first + len(some))
            clips += sampler.batch(some, bucket=Bucket(17, 64, 64), settings=settings, seeds=seeds)
        told = scores([judge(clip) for clip in clips], [scene for scene, _ in SCENES])
        return {**told, "mean": sum(told[what] for what in ("colour", "shape", "direction")) / 3}

    return score


@pytest.mark.slow
def test_swapped_experts_a_wrong_shift_and_missing_guidance_lower_the_judges_score(judged, capsys):
    torch.set_num_threads(1)
    ways = {
        "right": {},
        "swapped experts": {"swap": True},
        "no guidance": {"guidance": 1.0},
        "guidance 6": {"guidance": 6.0},
        "shift 1": {"shift": 1.0},
        "shift 12": {"shift": 12.0},
    }
    found = {name: judged(**how) for name, how in ways.items()}
    with capsys.disabled():
        for name, told in found.items():
            print(f"\n{name:16} " + "  ".join(f"{what} {value:.1%}" for what, value in told.items()), end="")
    assert judged() == found["right"], "the same prompts, seeds and settings are judged alike"
    right = found["right"]["mean"]
    assert right > 0.9
    assert found["swapped experts"]["mean"] < right - 0.1
    assert found["no guidance"]["mean"] < right - 0.03
