"""Write what runs have trained, or what a folder holds, as files that others load; say what a file is.

python export.py run=HIGH,LOW out=DIR        python export.py inspect=FILE        python export.py --help
"""

from pathlib import Path

from omegaconf import DictConfig

from wantrain import config, world
from wantrain.models.inspect import describe
from wantrain.models.pipeline import CARD, About, write_pipeline
from wantrain.training.gather import add_loras, gather_experts
from wantrain.training.publish import convert_lora, export_vae
from wantrain.training.run import trained_experts


@config.app("export")
def main(cfg: DictConfig) -> None:
    """Gather the experts (LoRAs merged), write them in the layout asked for, and each LoRA as a file of its own."""
    config.check(cfg)
    if cfg.inspect is not None:
        world.say(describe(config.locate(cfg.inspect)))
        return
    out, lora = config.needed_path(cfg, "out"), config.plain(cfg.lora)
    how = {key: lora.pop(key) for key in ("scale", "alpha")}
    dialect, files = lora.pop("dialect"), {name: file for name, file in lora.items() if file is not None}
    trained = trained_experts(cfg.run, cfg.runs) if cfg.run is not None else []
    if trained and trained[0].name == "vae":
        export_vae(trained[0], out, measure=None if cfg.measure is None else Path(cfg.measure))
        return
    base = config.base(cfg, [*cfg.model.experts, "vae", "text_encoder", "tokenizer"]) if config.has_base(cfg) else None
    if base is None and not trained and files:
        for name, file in files.items():
            target = out / f"{Path(file).stem}_{dialect}.safetensors"
            convert_lora(config.locate(file), target, dialect, {"expert": name}, alpha=how["alpha"])
        return
    model = trained[0].config["model"] if trained else config.plain(cfg.model)
    facts = {"model": model["name"], "boundary": model["boundary"]}
    gathered = gather_experts(
        model["experts"], **facts, run=cfg.run, runs=cfg.runs, base=base, locate=config.locate, alone=cfg.alone
    )
    add_loras(gathered.experts, files, model=model["name"], **how)
    world.claim_folder(out, mark=CARD, key="out")
    origin = gathered.origin()
    for name, file in files.items():
        origin[name]["merged"] = Path(file).name
    about = About(
        **facts, shift=model["shift"], guidance=model["guidance"], steps=model["sampling_steps"], origin=origin
    )
    write_pipeline(
        out,
        gathered.experts,
        base=gathered.base,
        about=about,
        layout=cfg.layout,
        dtype=config.dtype(cfg.dtype),
        shard_bytes=int(cfg.shard_gb * 2**30),
    )
    world.say(f"wrote {out}: {', '.join(gathered.experts)}; {out / CARD} says how to load and sample it")
    for expert in gathered.trained:
        if expert.adapter is not None:
            file = out / "lora" / f"{expert.config['run']}_{expert.name}.safetensors"
            convert_lora(expert.adapter, file, dialect, about.metadata(expert.name))


if __name__ == "__main__":
    main()
