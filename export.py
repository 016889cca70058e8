"""Write what runs have trained as files that others load: a pipeline in the diffusers layout, and LoRA files.

python export.py run=NAME out=DIR        python export.py run=HIGH,LOW out=DIR
"""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from wantrain import config, world
from wantrain.models.pipeline import write_pipeline
from wantrain.training.gather import gather_experts
from wantrain.training.run import trained_experts


@config.app("export")
def main(cfg: DictConfig) -> None:
    """Gather the experts (LoRAs merged), write the pipeline folder, and each LoRA as a file of its own."""
    config.check(cfg)
    out = Path(cfg.out)
    model = trained_experts(cfg.run, cfg.runs)[0].config["model"]
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


if __name__ == "__main__":
    main()
