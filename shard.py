"""Turn a folder of videos and images into video shards.

python shard.py source=DIR out=DIR model=tiny        python shard.py --help
"""

from pathlib import Path

from omegaconf import DictConfig

from wantrain import config, world
from wantrain.data import find_footage, write_report, write_video_shards


@config.app("shard")
def main(cfg: DictConfig) -> None:
    """Find footage and captions, probe every file, choose windows by timestamp, write tars and a manifest."""
    config.check(cfg)
    world.single_process("shard.py")
    footage, rejects = find_footage(
        Path(cfg.source),
        caption_missing=cfg.caption.missing,
        caption_prefix=cfg.caption.prefix,
        caption_default=cfg.caption.default,
    )
    write_video_shards(
        footage,
        rejects,
        Path(cfg.out),
        model=cfg.model.name,
        num_frames=cfg.num_frames,
        fps=cfg.fps,
        clips=cfg.clips,
        rejects_limit=cfg.rejects.limit,
        shard_bytes=cfg.shard_mb << 20,
    )
    if cfg.report != "none":
        write_report(Path(cfg.out), "video")


if __name__ == "__main__":
    main()
