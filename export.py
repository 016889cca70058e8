"""Write what runs have trained as files that others load: a pipeline in the diffusers layout, and LoRA files.

python export.py run=NAME out=DIR        python export.py run=HIGH,LOW out=DIR
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from wantrain import config, world
from wantrain.data import PixelData
from wantrain.models import load_vae
from wantrain.models.pipeline import write_pipeline
from wantrain.models.vae import measure_latents
from wantrain.models.weights import write_part
from wantrain.training.gather import gather_experts
from wantrain.training.run import TrainedExpert, trained_experts

#: Longest clip that latents are measured on: whole clips, where training may have used parts of them.
LONGEST = 81
#: Clips encoded at once for that.
TOGETHER = 8


@config.app("export")
def main(cfg: DictConfig) -> None:
    """Gather the experts (LoRAs merged), write the pipeline folder, and each LoRA as a file of its own."""
    config.check(cfg)
    out = Path(cfg.out)
    first = trained_experts(cfg.run, cfg.runs)[0]
    if first.name == "vae":
        export_vae(first, out, measure=None if cfg.measure is None else Path(cfg.measure))
        return
    model = first.config["model"]
    gathered = gather_experts(
        model["experts"],
        model=model["name"],
        boundary=model["boundary"],
        run=cfg.run,
        runs=cfg.runs,
        weights=cfg.weights,
        locate=config.locate,
    )
    world.claim_folder(out, mark="model_index.json", key="out")
    write_pipeline(
        out,
        gathered.experts,
        base=gathered.base,
        boundary=model["boundary"],
        shift=model["shift"],
        dtype=config.dtype(cfg.dtype),
    )
    world.say(f"wrote {out}: {', '.join(gathered.experts)}; WanPipeline.from_pretrained({str(out)!r}) loads it")
    for expert in gathered.trained:
        if expert.adapter is not None:
            file = out / "lora" / f"{expert.config['run']}_{expert.name}.safetensors"
            file.parent.mkdir(exist_ok=True)
            shutil.copyfile(expert.adapter, file)
            world.say(f"wrote {file} (ComfyUI and diffusers load it; sample.py lora.{expert.name}=FILE)")


def export_vae(trained: TrainedExpert, out: Path, *, measure: Path | None) -> None:
    """Write a VAE that a recipe trained, with its latents' mean and spread as measured on `measure`, video shards
    (None: its own training clips).

    Stored as float16: half the size, and its rounding is far below the VAE's own error. Where only the decoder was
    trained, latents and their normalisation stay as they were.
    """
    vae, settings = load_vae(trained.checkpoint), trained.config["data"]
    mean, std = vae.latents_mean, vae.latents_std
    if trained.config["expert"]["trains"] == "all":
        size = {key: settings[key] for key in ("area", "multiple", "holdout", "seed")}
        data = PixelData(shards=measure or settings["shards"], num_frames=LONGEST, **size)
        mean, std = measure_latents(vae, whole_clips(data))
    world.claim_folder(out / "vae", mark="config.json", key="out")
    tensors = {key: tensor.half() for key, tensor in vae.state_dict().items()}
    write_part(out / "vae", {**vae.config(), "latents_mean": list(mean), "latents_std": list(std)}, tensors)
    world.say(f"wrote {out / 'vae'}")


def whole_clips(data: PixelData) -> Iterator[Tensor]:
    """The pixels of every training clip, some of one bucket at a time: a lone small clip is six times slower."""
    for bucket in np.unique(data.buckets):
        members = np.flatnonzero(data.buckets == bucket)
        for start in range(0, len(members), TOGETHER):
            some = members[start : start + TOGETHER]
            yield data.load(some, [0] * len(some)).latents_BCTHW


if __name__ == "__main__":
    main()
