"""Turn video shards into latent shards: Wan-VAE latents and umT5 embeddings.

python encode.py shards=DIR out=DIR model=tiny        python encode.py --help
"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from wantrain import config, geometry, world
from wantrain.data import encode_shards, write_report
from wantrain.models.weights import fingerprint


@config.app("encode")
def main(cfg: DictConfig) -> None:
    """Decode every clip, bring it to its bucket, encode pixels and captions, write tars and a manifest."""
    config.check(cfg)
    world.single_process("encode.py")
    world.set_threads()
    device, base = config.device(cfg.device), config.base(cfg, ["vae", "text_encoder", "tokenizer"])
    vae, text = base.vae(device=device), base.text_encoder(device=device, dtype=config.dtype(cfg.precision))

    @torch.inference_mode()
    def encode_pixels(pixels_BCTHW: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels_BCTHW.to(device)).cpu()

    encode_shards(
        Path(cfg.shards),
        Path(cfg.out),
        encode_pixels=encode_pixels,
        encode_texts=text.encode_unpadded,
        sizes=geometry.sizes(cfg.area, cfg.model.multiple, cfg.aspects),
        temporal_stride=vae.temporal_stride,
        spatial_stride=vae.spatial_stride,
        model=cfg.model.name,
        vae_fingerprint=fingerprint(vae),
        text_fingerprint=fingerprint(text),
        rejects_limit=cfg.rejects.limit,
        shard_bytes=cfg.shard_mb << 20,
    )
    if cfg.report != "none":
        decode = (lambda latents: vae.decode(latents.to(device))) if cfg.report == "decode" else None
        write_report(Path(cfg.out), "latent", decode=decode, count_tokens=text.count)


if __name__ == "__main__":
    main()
