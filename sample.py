"""Make videos from prompts, with what a run has trained or with a pipeline folder; or show several side by side.

python sample.py run=NAME prompt="..."        python sample.py compare=[RUN,OTHER,base] prompts=FILE
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.geometry import Bucket
from wantrain.models import Base, WanVAE
from wantrain.models.offload import OffloadPolicy
from wantrain.models.vae import vae_keywords
from wantrain.runs.experts import ExpertSources, check_used, find_compared, find_experts
from wantrain.runs.loras import LoraSettings
from wantrain.sampling import Peers, Settings, memory, peers
from wantrain.sampling.build import load_sampler
from wantrain.sampling.conditioning import ConditioningPixels, files_from, read_pixels
from wantrain.sampling.gallery import Gallery, fill, write_comparison, write_index
from wantrain.sampling.pairs import write_pairs
from wantrain.sampling.prompts import Job, list_jobs, read_prompts
from wantrain.util import devices, distributed
from wantrain.util.console import say
from wantrain.util.files import check_writable


@config.app("sample")
def main(cfg: DictConfig) -> None:
    """Sample `count` videos per prompt into a folder with a page that shows them; with compare=, a folder for each."""
    checks.check(cfg, given=config.given(cfg), processes=distributed.world_size())
    if cfg.dry_run:
        say(memory_plan(cfg))
        return
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise ValueError('give prompt="..." or prompts=FILE (one prompt per line)')
    distributed.set_threads()
    prompts = [cfg.prompt] if cfg.prompts is None else read_prompts(cfg.prompts)
    jobs = list_jobs(prompts, seed=cfg.seed, count=cfg.count * (1 if cfg.pairs is None else 2))
    size = (cfg.height, cfg.width) if cfg.height else None
    pixels = read_pixels(files_from(cfg), config.plain(cfg.model), num_frames=cfg.num_frames, size=size)
    loras = LoraSettings.of(config.plain(cfg.lora), config.locate)
    out = Path(cfg.pairs or cfg.out or ("samples" if cfg.compare is None else "compare"))
    check_writable(out, key="out" if cfg.pairs is None else "pairs")
    devices.announce(device := devices.choose(cfg.device))
    alone = {"": find(cfg, cfg.run)} if cfg.compare is None else {}
    several = alone or find_compared(list(cfg.compare), partial(find, cfg), runs=cfg.runs, locate=config.locate)
    found = {name: sources.with_loras(loras) for name, sources in several.items()}
    check_used(found.values(), loras, config.given(cfg))
    with peers.start(cfg.sequence_parallel, device, num_heads=cfg.model.transformer.num_attention_heads) as ours:
        galleries = {name: sample(cfg, sources, out / name, jobs, pixels, ours) for name, sources in found.items()}
    if cfg.compare is not None and all(gallery.writes for gallery in galleries.values()):
        write_comparison(out / "index.html", galleries, jobs)


def find(cfg: DictConfig, run: str | None, base: Base | None = None) -> ExpertSources:
    """Where the experts of a run, or of weights=, come from."""
    if config.has_base(cfg):
        base = config.base(cfg, [*cfg.model.experts, "vae", "text_encoder", "tokenizer"])
    facts = {"model": cfg.model.name, "boundary": cfg.model.boundary, "locate": config.locate, "alone": cfg.alone}
    return find_experts(list(cfg.model.experts), **facts, run=run, runs=cfg.runs, base=base)


def sample(
    cfg: DictConfig, found: ExpertSources, out: Path, jobs: list[Job], pixels: ConditioningPixels | None, ours: Peers
) -> Gallery:
    """Make what is missing of this process's share of `jobs`, and the page; nothing is loaded if nothing is missing."""
    device, dtype = devices.choose(cfg.device), config.dtype(cfg.precision)
    negative = cfg.model.negative_prompt if cfg.negative_prompt is None else cfg.negative_prompt
    settings = Settings({name: cfg.guidance[name] for name in found.names}, cfg.shift, cfg.steps, cfg.solver, negative)
    facts = {"boundary": cfg.model.boundary, "conditioning": cfg.model.conditioning, "tile": cfg.tile}
    more = {"model": cfg.model.name, "precision": cfg.precision, **facts, "fps": cfg.model.fps}
    more["loras"] = {name: [lora.record() for lora in some] for name, some in found.loras.items() if some}
    more |= {} if pixels is None else {"known": pixels.identity}  # the word is part of the samples' hashes
    size = config.video_size(cfg) if pixels is None else Bucket(*pixels.shape)
    gallery = Gallery(out, settings, size, cfg.model.fps, found.identity(), found.label(), more, ours)
    say(f"{out}: experts {', '.join(found.names)} of {found.label()}; {settings}")
    if missing := gallery.missing(jobs[distributed.Part.read(cfg.part).share(ours.size)]):
        texts, policy = [*(job.prompt for job in missing), negative], OffloadPolicy(**config.plain(cfg.offload))
        sampler = load_sampler(found, texts, policy, device=device, dtype=dtype, peers=ours, **facts)
        fill(gallery, missing, sampler, batch_size=cfg.batch_size, pixels=pixels)
    if gallery.writes:
        (write_index if cfg.pairs is None else write_pairs)(gallery, jobs)
    return gallery


def memory_plan(cfg: DictConfig) -> str:
    """What it will take, by arithmetic; of the weights only a VAE whose sizes no config says must be here."""
    vae = config.plain(cfg.model.vae) if "vae" in cfg.model else config.base(cfg, ["vae"]).vae().config()
    return memory.describe(
        lambda: config.build(cfg.model.transformer), lambda: WanVAE(**vae_keywords(vae, Path("model.vae"))),
        memory.Call(config.video_size(cfg), cfg.batch_size, cfg.tile, cfg.sequence_parallel, cfg.model.conditioning),
        names=list(cfg.model.experts), dtype=config.dtype(cfg.precision),
        policy=OffloadPolicy(**config.plain(cfg.offload)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
