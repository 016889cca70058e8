"""Turn a folder of videos and images, or WebDataset tars, into video shards.

python shard.py source=DIR out=DIR model=tiny        python shard.py --help
python shard.py init=DIR model=tiny                  looks at a folder first, and writes settings for all commands
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from wantrain import checks, config, geometry
from wantrain.data import ClipOptions, DecodeOptions, ShardOptions, find_footage, write_report, write_video_shards
from wantrain.data.advice.writing import settings_file_of, write_settings
from wantrain.util import distributed
from wantrain.util.files import check_writable


@config.app("shard")
def main(cfg: DictConfig) -> None:
    """Find footage and captions, survey every file, select clips by timestamp, write tars and a manifest."""
    if cfg.init is not None:  # what it writes is a file, and its source is the folder to look at
        file = settings_file_of(cfg.init, None if OmegaConf.is_missing(cfg, "out") else cfg.out)
        cfg.source, cfg.out = cfg.init, str(file)
    checks.check(cfg, given=config.given(cfg))
    distributed.single_process("shard.py")
    if cfg.init is not None:
        check_writable(file.parent, key="out")
        write_settings(Path(cfg.init), file, config.plain(cfg.model), _sizes(cfg), DecodeOptions(**cfg.decode))
        return
    out, options = Path(cfg.out), _options(cfg)
    downloads = out / ".downloads"
    check_writable(out, key="out")
    shutil.rmtree(downloads, ignore_errors=True)  # left by a killed run
    try:
        footage, rejects, tally = find_footage(
            cfg.source,
            caption_missing=cfg.caption.missing,
            caption_prefix=cfg.caption.prefix,
            caption_default=cfg.caption.default,
            downloads=downloads,
            out=out,
        )
        write_video_shards(footage, rejects, out, options, tally)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    if cfg.report != "none":
        write_report(out, "video")


def _sizes(cfg: DictConfig) -> geometry.Buckets:
    """The buckets that encode.py has for the model where nothing else is given."""
    encode = OmegaConf.load(config.CONF / "encode.yaml")
    return geometry.Buckets(
        (cfg.model.area,), tuple(encode.aspects), cfg.model.multiple, upscale=float(encode.upscale.limit)
    )


def _options(cfg: DictConfig) -> ShardOptions:
    return ShardOptions(
        model=cfg.model.name,
        clips=ClipOptions(
            num_frames=cfg.num_frames,
            fps={"native": None, "resample": cfg.model.fps}.get(cfg.fps, cfg.fps),
            clips=cfg.clips,
            stride=cfg.stride,
            stretch=cfg.stretch,
            lengths=tuple(cfg.lengths),
            seed=cfg.seed,
        ),
        scenes=cfg.scenes,
        static=cfg.static,
        duplicates=cfg.duplicates,
        interlaced=cfg.interlaced,
        rejects_limit=cfg.rejects.limit,
        shard_bytes=cfg.shard_mb << 20,
        decode=DecodeOptions(**cfg.decode),
    )


if __name__ == "__main__":
    main()
