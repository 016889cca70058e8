"""Make videos from a prompt, with what a run has trained or with a pipeline folder.

python sample.py run=NAME prompt="..."        python sample.py weights=DIR prompts=FILE
"""

from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from wantrain import config, world
from wantrain.geometry import Bucket, sizes
from wantrain.sampling import Settings
from wantrain.training.assemble import read_prompts
from wantrain.training.gather import add_loras, build_sampler, find_experts
from wantrain.video import contact_sheet, write_mp4

#: Videos on the contact sheet, at most.
SHOWN = 24


@config.app("sample")
def main(cfg: DictConfig) -> None:
    """Load the experts, sample `count` videos, write mp4 and a contact sheet."""
    config.check(cfg)
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise ValueError('give prompt="..." or prompts=FILE (one prompt per line)')
    prompts = [cfg.prompt] if cfg.prompts is None else read_prompts(cfg.prompts)
    world.set_threads()
    device = config.device(cfg.device)
    dtype = config.dtype(cfg.precision)
    wanted = [*cfg.model.experts, "vae", "text_encoder", "tokenizer"]
    base = config.base(cfg, wanted) if config.has_base(cfg) else None
    found = find_experts(
        list(cfg.model.experts),
        model=cfg.model.name,
        boundary=cfg.model.boundary,
        run=cfg.run,
        runs=cfg.runs,
        base=base,
        locate=config.locate,
        alone=cfg.alone,
    )
    experts = {name: found.load(name, device=device, dtype=dtype) for name in found.names}
    lora = config.plain(cfg.lora)
    how = {key: lora.pop(key) for key in ("scale", "alpha")}
    add_loras(experts, lora, model=cfg.model.name, **how)
    sampler = build_sampler(experts, boundary=cfg.model.boundary, base=found.base, device=device, dtype=dtype)
    height, width = (cfg.height, cfg.width) if cfg.height else sizes(cfg.model.area, cfg.model.multiple, [1.0])[0]
    negative = cfg.model.negative_prompt if cfg.negative_prompt is None else cfg.negative_prompt
    settings = Settings(
        guidance=config.plain(cfg.guidance),
        shift=cfg.shift,
        steps=cfg.steps,
        solver=cfg.solver,
        negative_prompt=negative,
    )
    out, clips = Path(cfg.out or "samples"), {}
    out.mkdir(parents=True, exist_ok=True)
    world.say(f"experts {', '.join(sampler.experts.models)}; {settings}")
    jobs = [(prompt, seed) for prompt in prompts for seed in range(cfg.seed, cfg.seed + cfg.count)]
    for first in range(0, len(jobs), cfg.batch_size):
        prompts, seeds = zip(*jobs[first : first + cfg.batch_size], strict=True)
        with tqdm(total=cfg.steps, desc=prompts[0][:40], unit="step") as bar:
            videos = sampler.batch(
                prompts,
                bucket=Bucket(cfg.num_frames, height, width),
                settings=settings,
                seeds=seeds,
                on_step=partial(show_step, bar),
            )
        for number, (prompt, seed, frames) in enumerate(zip(prompts, seeds, videos, strict=True), first):
            file = out / f"{number:03d}_seed_{seed}.mp4"
            clips[f"{file.stem}: {prompt}"] = frames
            write_mp4(file, frames, cfg.model.fps)
            world.say(f"wrote {file}")
    contact_sheet(out / "contact_sheet.png", dict(list(clips.items())[:SHOWN]))
    world.say(f"wrote {out / 'contact_sheet.png'}")


def show_step(bar: tqdm, step: int, expert: str) -> None:
    """Move the progress bar on, naming the expert that answers."""
    bar.set_postfix_str(expert)
    bar.update()


if __name__ == "__main__":
    main()
