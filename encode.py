"""Turn video shards into latent shards: Wan-VAE latents and umT5 embeddings.

python encode.py shards=DIR out=DIR model=tiny        python encode.py --help
accelerate launch --num_processes 2 encode.py ...     python encode.py out=DIR check=true
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

import functools
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from wantrain import checks, config, data
from wantrain.models.formats.fingerprints import Fingerprints, identity
from wantrain.models.formats.weights import fingerprint
from wantrain.models.precision import computing_in
from wantrain.util import devices, distributed
from wantrain.util.files import check_writable


@config.app("encode")
def main(cfg: DictConfig) -> None:
    """Decode every clip, fit it to its bucket, encode pixels and captions, write tars and a manifest."""
    if cfg.check is True:
        checks.check_given(cfg, config.given(cfg))
        data.check_folder(config.needed_path(cfg, "out"))
        return
    checks.check(cfg, given=config.given(cfg))
    check_writable(Path(cfg.out), key="out")
    distributed.set_threads()
    device, base = devices.choose(cfg.device), config.base(cfg, ["vae", "text_encoder", "tokenizer"])
    devices.announce(device)

    # Loaded on first use: not at all if nothing is to be encoded.
    vae = functools.cache(lambda half: base.vae(half=half, device=device))
    text = functools.cache(lambda: base.text_encoder(device=device, dtype=config.dtype(cfg.precision)))

    def facts_of_vae() -> dict[str, Any]:
        strides = {key: getattr(vae("encoder"), key) for key in ("temporal_stride", "spatial_stride")}
        return {"vae_fingerprint": fingerprint(vae("encoder")), **strides}

    def facts_of_text() -> dict[str, Any]:
        return {"text_fingerprint": fingerprint(text()), "tokenizer_fingerprint": text().tokenizer_fingerprint()}

    @torch.inference_mode()
    def encode_pixels(pixels_BCTHW: torch.Tensor) -> torch.Tensor:
        with computing_in(config.dtype(cfg.vae_precision), device):
            return vae("encoder").encode(pixels_BCTHW)

    @torch.inference_mode()
    def decode_latents(latents_BCTHW: torch.Tensor) -> torch.Tensor:
        with computing_in(config.dtype(cfg.vae_precision), device):
            return vae("decoder").decode(latents_BCTHW.to(device))

    out, prints, dtype = Path(cfg.out), Fingerprints(Path(cfg.out)), config.dtype(cfg.precision)
    files = {part: identity(base, part, dtype) for part in ("vae", "text_encoder")}
    of_vae = prints.of("vae", files["vae"], facts_of_vae)
    strides = {key: of_vae.pop(key) for key in ("temporal_stride", "spatial_stride")}
    encoders = data.Encoders(
        encode_pixels=encode_pixels,
        encode_texts=lambda captions: text().encode_unpadded(captions),
        count_tokens=lambda caption: text().count(caption),
        device=device,
        **of_vae,
        vae_precision=cfg.vae_precision,
        **prints.of("text encoder", files["text_encoder"], facts_of_text),
        files=files,
    )
    sizes, inputs = config.buckets(cfg, strides["temporal_stride"]), config.conditioning_inputs(cfg, **strides)
    finished = data.encode_shards(cfg.shards, out, encoders, sizes=sizes, inputs=inputs, options=_options(cfg))
    prints.write()
    if cfg.report != "none" and finished is not None:
        decode = decode_latents if cfg.report == "decode" else None
        data.write_report(out, "latent", decode=decode, count_tokens=encoders.count_tokens)
    if cfg.upload is not None and finished is not None:
        data.upload_folder(out, cfg.upload)


def _options(cfg: DictConfig) -> data.EncodeOptions:
    return data.EncodeOptions(
        model=cfg.model.name,
        fps=cfg.model.fps,
        num_frames=cfg.model.num_frames,
        rejects_limit=cfg.rejects.limit,
        shard_bytes=cfg.shard_mb << 20,
        shard_clips=cfg.shard_clips,
        loss_mask=cfg.loss_mask,
        batch_pixels=cfg.batch_pixels,
        retry=cfg.decode.retry,
        part=distributed.Part.read(cfg.part),
        heartbeat_timeout=cfg.heartbeat_timeout,
        decode=data.DecodeOptions(workers=cfg.decode.workers, timeout=cfg.decode.timeout),
        cache=cfg.cache,
        cache_gb=cfg.cache_gb,
    )


if __name__ == "__main__":
    main()
