"""Write what runs have trained, or what a folder holds, as files that others load; say what a file is.

python export.py run=HIGH,LOW out=DIR        python export.py inspect=FILE        python export.py --help
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.models import WanTransformer
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.pipeline import CARD, About, sentinel_file, write_pipeline
from wantrain.runs.experts import Loras, add_loras, base_of, check_loras, find_experts
from wantrain.runs.export import convert_lora, export_vae
from wantrain.runs.folder import trained_experts
from wantrain.util.console import say
from wantrain.util.files import claim_folder


@config.app("export")
def main(cfg: DictConfig) -> None:
    """Gather the experts (LoRAs merged), write them in the layout asked for, and each LoRA as a file of its own."""
    checks.check(cfg, given=config.given(cfg))
    if cfg.inspect is not None:
        say(describe(config.locate(cfg.inspect)))
        return
    out, lora = config.needed_path(cfg, "out"), config.plain(cfg.lora)
    dialect, loras = lora.pop("dialect"), Loras.of(lora)
    files = loras.files
    trained = trained_experts(cfg.run, cfg.runs) if cfg.run is not None else []
    if trained and trained[0].name == "vae":
        export_vae(trained[0], out, measure=None if cfg.measure is None else Path(cfg.measure))
        return
    # The other layouts hold transformers alone.
    beside = ["vae", "text_encoder", "tokenizer"] if cfg.layout == "diffusers" else []
    base = config.base(cfg, [*cfg.model.experts, *beside]) if config.has_base(cfg) else None
    if base is None and not trained and files:
        for name, file in files.items():
            target = out / f"{Path(file).stem}_{dialect}.safetensors"
            convert_lora(config.locate(file), target, dialect, {"expert": name}, alpha=loras.alpha)
        return
    model = trained[0].config["model"] if trained else config.plain(cfg.model)
    facts = {"model": model["name"], "boundary": model["boundary"]}
    if base is None and trained:
        made = {expert.name for expert in trained}
        base = base_of(trained[0].config, config.locate, [*(set(model["experts"]) - made), *beside])
    found = find_experts(
        model["experts"], **facts, run=cfg.run, runs=cfg.runs, base=base, locate=config.locate, alone=cfg.alone
    )
    check_loras(files, found.names)
    claim_folder(out, sentinel=sentinel_file(cfg.layout), key="out")
    origin, dtype = found.origin(), config.dtype(cfg.dtype)
    for name, file in files.items():
        origin[name]["merged"] = Path(file).name

    def experts() -> Iterator[tuple[str, WanTransformer]]:
        """One expert after the other: a pair need not fit into memory together. What is merged is merged in float32."""
        for name in found.names:
            merged = name in files or found.has_adapter(name)
            module = found.load(name, dtype=torch.float32 if merged else dtype)
            add_loras({name: module}, loras.only(name), model=model["name"])
            yield name, module

    more = {"shift": model["shift"], "guidance": model["guidance"], "conditioning": model.get("conditioning", "none")}
    about = About(**facts, **more, steps=model["sampling_steps"], origin=origin)
    size = int(cfg.shard_gb * 2**30)
    write_pipeline(out, experts(), base=found.base, about=about, layout=cfg.layout, dtype=dtype, shard_bytes=size)
    say(f"wrote {out}: {', '.join(found.names)}; {out / CARD} says how to load and sample it")
    for expert in found.trained:
        if expert.adapter is not None:
            path = out / "lora" / f"{expert.config['run']}_{expert.name}.safetensors"
            convert_lora(expert.adapter, path, dialect, about.metadata(expert.name))


if __name__ == "__main__":
    main()
