"""Run folders with a made-up log, for tests of pages."""

import json

import numpy as np
import yaml

from wantrain.data.loading.views import view_of
from wantrain.video import write_mp4

#: A step whose loss is far above the usual, and the clip that is the reason.
SPIKE, CULPRIT = 37, "clip-5"
PROMPTS = ["a red ring moves left", '</script><script>document.title="taken"</script> 一只猫 🐈 <b>']
LEVELS = (0.1, 0.3, 0.5, 0.7)


def write_log(path, steps, *, experts=("low_noise",), every=10):
    """A metrics.jsonl: losses that fall, a spike, readings by noise level, validation every 20 steps."""
    rng, rows = np.random.default_rng(0), []
    for step in range(steps + 1):
        expert = experts[step % len(experts)]
        row = {"step": step}
        if step:
            clips = [[f"clip-{i}", float(level), float(0.2 * rng.uniform(0.9, 1.1))] for i, level in enumerate(LEVELS)]
            if step == SPIKE:
                clips[2] = [CULPRIT, 0.5, 40.0]
            row |= {"samples": 4 * step, "loss": float(np.mean([loss for *_, loss in clips])), "lr": 1e-4}
            row |= {"grad_norm": 0.1, "times_usual": 14.0 if step == SPIKE else 1.0, "clips": clips, "seconds": 0.5}
            row |= {"time/forward": 0.2, "time/backward": 0.3}
            row |= {"expert": expert} if len(experts) > 1 else {}
        if step and step % every == 0:
            for name in experts:
                prefix = f"{name}/" if len(experts) > 1 else ""
                row[f"{prefix}loss_by_sigma"] = {f"{level:.4f}": 0.2 - step / 1000 for level in LEVELS}
            row |= {"host_gb": 1.5, "tokens_per_second": 900.0}
        if step % 20 == 0:
            for name in experts:
                prefix = f"{name}/" if len(experts) > 1 else ""
                change = {"": -step / 1000, "_low": -step / 1000 - 0.01, "_high": -step / 1000 + 0.01, "_p": 0.01}
                row |= {f"{prefix}validation_change{end}": value for end, value in change.items()}
                row |= {f"{prefix}validation_loss": 0.3 - step / 1000, f"{prefix}validation_verdict": "better"}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder, *, steps=60, experts=("low_noise",), videos=False):
    """A run folder; with `videos` it has previews of three steps."""
    (folder / "samples").mkdir(parents=True)
    name = experts[0] if len(experts) == 1 else "both"
    config = {"expert": {"name": name}, "model": {"name": "tiny", "experts": list(experts)}, "optimizer": {"lr": 1e-4}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_log(folder / "metrics.jsonl", steps, experts=experts)
    spiked = [{"id": CULPRIT, "position": 0, "sigma": 0.5, "loss": 40.0}]
    record = {"step": SPIKE, "safeguard": "spike", "expert": name, "rank": 0, "times_usual": 14.0, "samples": spiked}
    (folder / "safeguards.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if videos:
        rows = []
        for step in (0, 30, 60):
            for number, prompt in enumerate(PROMPTS):
                file = f"step_{step:06d}_{number}.mp4"
                ramp = np.linspace(0, 255, 33).astype(np.uint8)[:, None, None, None]
                write_mp4(folder / "samples" / file, np.broadcast_to(ramp, (33, 48, 64, 3)), 16)
                rows.append({"step": step, "number": number, "prompt": prompt, "seed": number, "file": file,
                             "motion": 1.0, "flicker": 0.5})  # fmt: skip
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / "samples" / "previews.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def find_clip(name):
    """A view of any clip: latents whose values depend on its name."""
    import torch

    seed = int(name.rpartition("-")[2])
    return view_of(
        torch.randn(16, 3, 6, 8, generator=torch.Generator().manual_seed(seed)), f"caption of {name}", "9x48x64"
    )
