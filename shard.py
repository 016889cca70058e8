"""Turn a folder of videos and images, or WebDataset tars, into video shards.

python shard.py source=DIR out=DIR model=tiny        python shard.py --help
"""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.data import find_footage, write_report, write_video_shards
from wantrain.util import distributed


@config.app("shard")
def main(cfg: DictConfig) -> None:
    """Find footage and captions, read every file, choose clips by timestamp, write tars, a stats and a manifest."""
    checks.check(cfg)
    distributed.single_process("shard.py")
    out = Path(cfg.out)
    downloads = out / ".downloads"
    shutil.rmtree(downloads, ignore_errors=True)  # of a run that was killed
    try:
        footage, rejects = find_footage(
            cfg.source,
            caption_missing=cfg.caption.missing,
            caption_prefix=cfg.caption.prefix,
            caption_default=cfg.caption.default,
            downloads=downloads,
        )
        write_video_shards(
            footage,
            rejects,
            out,
            model=cfg.model.name,
            num_frames=cfg.num_frames,
            fps={"native": None, "resample": cfg.model.fps}.get(cfg.fps, cfg.fps),
            rejects_limit=cfg.rejects.limit,
            shard_bytes=cfg.shard_mb << 20,
            clips=cfg.clips,
            stride=cfg.stride,
            stretch=cfg.stretch,
            lengths=cfg.lengths,
            scenes=cfg.scenes,
            static=cfg.static,
            duplicates=cfg.duplicates,
            seed=cfg.seed,
            **cfg.decode,
        )
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    if cfg.report != "none":
        write_report(out, "video")


if __name__ == "__main__":
    main()
