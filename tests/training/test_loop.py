"""The loop is the textbook's: a plain loop over the same samples gives the same bits, and so does a second run."""

import functools
import json
import math

import pytest
import torch

from wantrain import config, flow
from wantrain.data import BatchSampler
from wantrain.models import WanTransformer
from wantrain.training.engine.optim import named_trainable
from wantrain.util.seeds import generator_at, seed_at

STEPS, BATCH, SEED = 50, 4, 3
COMMAND = ("init=scratch", f"batch_size={BATCH}", f"seed={SEED}", f"steps={STEPS}", "optimizer.lr=1e-3", "clip=0.5")


@functools.cache
def by_hand(tiny):
    """Losses and gradient norms of a low-noise expert from random values, with torch and nothing of ours but the model,
    the samples' order and the distribution of noise; and the model itself."""
    cfg = config.compose("train", [*tiny.train, *COMMAND])
    data = config.build(cfg.data)
    plan = BatchSampler(data.buckets, batch_size=BATCH, seed=SEED)
    torch.manual_seed(seed_at(SEED, "weights", "low_noise"))
    model = WanTransformer(**{key: value for key, value in cfg.model.transformer.items() if key != "_target_"})
    groups = {"hidden": [], "matrices": [], "others": []}
    for name, parameter in named_trainable(model).items():
        kind = "matrices" if parameter.ndim >= 2 and parameter.shape[0] > 1 else "others"
        groups["hidden" if kind == "matrices" and "blocks." in name and parameter.ndim == 2 else kind].append(parameter)
    decay = {"hidden": 0.01, "matrices": 0.01, "others": 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay[kind]} for kind, parameters in groups.items()],
        lr=1e-3, betas=(0.9, 0.99), eps=1e-8,
    )  # fmt: skip
    log = []
    for step in range(STEPS):
        batch = data.load(plan.batch(step), range(step * BATCH, (step + 1) * BATCH))
        generators = [generator_at(SEED, "noise", position) for position in range(step * BATCH, (step + 1) * BATCH)]
        window = flow.NoiseWindow(0.0, 0.875)
        draw = functools.partial(flow.draw_sigma, 1, density="uniform", shift=3.0, window=window)
        sigma = torch.cat([draw(generator=generator) for generator in generators])
        x0 = batch.latents_BCTHW
        noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
        s = sigma[:, None, None, None, None]
        velocity = model((1 - s) * x0 + s * noise, 1000 * sigma, batch.text_BLD)
        loss = (velocity - (noise - x0)).square().mean(dim=(1, 3, 4)).mean(dim=1).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        warmup = STEPS // 10
        progress = (step - warmup) / (STEPS - warmup)
        scale = (step + 1) / (warmup + 1) if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss.item(), norm.item()))
    return log, model


def run(call, tmp_path, name, tiny, *more):
    call("train.py", *tiny.train, *COMMAND, f"run={name}", *more)
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def test_loop_matches_plain_loop(tiny, call, tmp_path):
    """Fifty steps match those of a plain loop, and a second run repeats them bit for bit."""
    wanted, _ = by_hand(tiny)
    first = run(call, tmp_path, "first", tiny)
    assert first == run(call, tmp_path, "second", tiny), "bit for bit"
    assert [pair[0] for pair in first] == pytest.approx([pair[0] for pair in wanted], rel=1e-6)
    assert [pair[1] for pair in first] == pytest.approx([pair[1] for pair in wanted], rel=1e-5)
