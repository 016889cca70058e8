"""Write captions for a folder of videos and images with a vision-language model, as text files that shard.py reads.

python caption.py source=DIR model=tiny        python caption.py --help
python caption.py source=DIR review=true       python caption.py source=DIR apply=DIR/captions.csv
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.data import (
    CaptionOptions,
    DecodeOptions,
    Describe,
    FrameOptions,
    apply_table,
    caption_footage,
    read_template,
    write_review,
)
from wantrain.models.captioner import load_captioner
from wantrain.models.text import token_counter
from wantrain.util import devices, distributed
from wantrain.util.files import check_writable


@config.app("caption")
def main(cfg: DictConfig) -> None:
    """Find footage without a caption, show its frames to the model, and write what it says beside each file."""
    checks.check(cfg, given=config.given(cfg))
    distributed.single_process("caption.py")
    source = Path(cfg.source)
    if source.is_dir():
        check_writable(source, key="source")
    if cfg.apply is not None:
        apply_table(source, Path(cfg.apply))
        return
    count_tokens = _token_counter(cfg)
    if cfg.review:
        write_review(source, count_tokens, DecodeOptions(**cfg.decode))
        return
    options = CaptionOptions(
        captioner=cfg.captioner,
        revision=cfg.captioner_revision,
        template=read_template(cfg.template, trigger=cfg.trigger, words=cfg.words),
        frames=FrameOptions(**cfg.frames),
        recaption=cfg.recaption,
        max_tokens=cfg.max_tokens,
        batch_size=cfg.batch_size,
        decode=DecodeOptions(**cfg.decode),
    )
    caption_footage(source, options, lambda: _describe(cfg), count_tokens)


def _token_counter(cfg: DictConfig) -> Callable[[str], int]:
    """What counts a caption's tokens, with the tokenizer of the model that will be trained."""
    return token_counter(config.base(cfg, ["tokenizer"]).need("tokenizer"))


def _describe(cfg: DictConfig) -> Describe:
    """The captioner, loaded."""
    distributed.set_threads()
    device = devices.choose(cfg.device)
    devices.announce(device)
    captioner = load_captioner(
        cfg.captioner,
        revision=cfg.captioner_revision,
        device=device,
        dtype=config.dtype(cfg.precision),
        max_tokens=cfg.max_tokens,
    )
    return captioner.describe


if __name__ == "__main__":
    main()
