"""Write what runs have trained, or what a folder holds, as files that others load; say what a file is.

python export.py run=HIGH,LOW out=DIR        python export.py inspect=FILE        python export.py --help
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.models import WanTransformer
from wantrain.models.formats.export_folder import claim_export
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.pipeline import CARD, About, write_pipeline
from wantrain.runs.experts import ExpertSources, base_of, find_experts
from wantrain.runs.export import convert_loras, export_vae, write_converted
from wantrain.runs.folder import trained_experts
from wantrain.runs.loras import LoraSettings
from wantrain.util.console import say


@config.app("export")
def main(cfg: DictConfig) -> None:
    """Gather the experts (LoRAs merged), write them in the layout asked for, and each LoRA as a file of its own."""
    checks.check(cfg, given=config.given(cfg))
    if cfg.inspect is not None:
        say(describe(config.locate(cfg.inspect)))
        return
    out, lora = config.needed_path(cfg, "out"), config.plain(cfg.lora)
    dialect, loras = lora.pop("dialect"), LoraSettings.of(lora, config.locate)
    trained = trained_experts(cfg.run, cfg.runs) if cfg.run is not None else []
    if trained and trained[0].name == "vae":
        loras.check_used([loras.over({}, ["vae"])])
        measure = None if cfg.measure is None else Path(cfg.measure)
        export_vae(trained[0], out, measure=measure, overwrite=cfg.overwrite)
        return
    # The other layouts hold transformers alone.
    beside = ["vae", "text_encoder", "tokenizer"] if cfg.layout == "diffusers" else []
    base = config.base(cfg, [*cfg.model.experts, *beside]) if config.has_base(cfg) else None
    if base is None and not trained and loras.files:
        convert_loras(loras, out, dialect, overwrite=cfg.overwrite)
        return
    model = trained[0].config["model"] if trained else config.plain(cfg.model)
    facts = {"model": model["name"], "boundary": model["boundary"]}
    if base is None and trained:
        made = {expert.name for expert in trained}
        base = base_of(trained[0].config, config.locate, [*(set(model["experts"]) - made), *beside])
    found = find_experts(
        model["experts"], **facts, run=cfg.run, runs=cfg.runs, base=base, locate=config.locate, alone=cfg.alone
    ).with_loras(loras)
    loras.check_used([found.loras])
    dtype = config.dtype(cfg.dtype)
    size = found.num_parameters() * dtype.itemsize + found.num_bytes(beside)
    claim_export(out, cfg.layout, reads=found.places(beside), size=size, overwrite=cfg.overwrite)

    def experts() -> Iterator[tuple[str, WanTransformer]]:
        """One expert after the other: a pair need not fit into memory together. What is merged is merged in float32."""
        for name in found.names:
            yield name, found.load(name, dtype=torch.float32 if found.loras[name] else dtype)

    more = {"shift": model["shift"], "guidance": model["guidance"], "conditioning": model.get("conditioning", "none")}
    about = About(**facts, **more, steps=model["sampling_steps"], origin=found.origin())
    write_pipeline(
        out, experts(), base=found.base, about=about, layout=cfg.layout, dtype=dtype,
        shard_bytes=int(cfg.shard_gb * 2**30), further=partial(write_run_loras, found, about, dialect),
    )  # fmt: skip
    say(f"wrote {out}: {', '.join(found.names)}; {out / CARD} says how to load and sample it")


def write_run_loras(found: ExpertSources, about: About, dialect: str, folder: Path) -> None:
    """The LoRAs that runs trained, each as a file in folder/lora, with the strength that is merged."""
    for name, some in found.loras.items():
        for lora in some:
            if lora.run is not None:
                target = folder / "lora" / f"{lora.run}_{name}.safetensors"
                write_converted(target, lora.read(name), lora.strength, dialect, about.metadata(name))
                say(f"{name}: its LoRA alone is lora/{target.name} ({dialect}; sample.py lora.{name}=FILE)")


if __name__ == "__main__":
    main()
