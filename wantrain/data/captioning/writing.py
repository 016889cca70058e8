"""Captions for a folder of footage, written as text files that shard.py reads; any number of starts finish the work."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from wantrain.data.captioning.frames import FrameOptions, Shown, shown_frames
from wantrain.data.captioning.records import Record, Records
from wantrain.data.captioning.sidecars import Captioned, read_captions, table_of
from wantrain.data.captioning.templates import Template
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.util.console import say
from wantrain.util.files import write_atomically

#: Text tokens that a Wan transformer takes.
TEXT_LENGTH = 512
#: Files of one kind that the summary names.
NAMED = 5

#: Clips of one kind (frames and rate) and a prompt for each -> the answer to each, and whether it was cut.
Describe = Callable[[Sequence[Shown], Sequence[str]], Sequence[tuple[str, bool]]]


@dataclass(frozen=True)
class CaptionOptions:
    """How footage is captioned.

    captioner, revision  the vision-language model, as given
    template    what it is asked
    frames      what it is shown
    recaption   "none": files without a caption only; "own": also captions of this command that were made otherwise;
                "all": also a person's, whose text the record keeps
    max_tokens  most tokens of an answer
    batch_size  clips that are captioned at once
    decode      decoder processes
    """

    captioner: str
    revision: str | None
    template: Template
    frames: FrameOptions
    recaption: Literal["none", "own", "all"] = "none"
    max_tokens: int = 384
    batch_size: int = 1
    decode: DecodeOptions = field(default_factory=DecodeOptions)

    def made_from(self, sha256: str) -> str:
        """A hash of all that makes the caption of a file with these bytes, batch size and precision apart."""
        prompts = [self.template.prompt(is_video=is_video) for is_video in (True, False)]
        parts = [
            sha256,
            self.captioner,
            self.revision,
            prompts,
            self.template.trigger,
            asdict(self.frames),
            self.max_tokens,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass
class _Work:
    """A caption to be made: of one or several files with the same bytes."""

    sha256: str
    made_from: str
    files: list[Captioned]


class _Writer:
    """Writes captions, each recorded first, and counts what happens."""

    def __init__(self, records: Records, options: CaptionOptions) -> None:
        self.records, self.options = records, options
        self.counts: Counter[str] = Counter()
        self.failed: list[tuple[str, str]] = []
        self.captions: dict[str, str] = {}

    def write(self, work: _Work, caption: str) -> None:
        """Write a caption for each file of the work."""
        template = self.options.template
        for each in work.files:
            if each.origin == "person":
                self.records.add(Record(each.file.name, each.caption, "person"))
            self.records.add(
                Record(
                    each.file.name,
                    caption,
                    "caption.py",
                    sha256=work.sha256,
                    made_from=work.made_from,
                    captioner=self.options.captioner,
                    template=template.name,
                    trigger=template.trigger,
                )
            )
            write_atomically(each.place, f"{caption}\n")
            self.counts["written"] += 1
            self.captions[each.file.name] = caption

    def fail(self, work: _Work, reason: str) -> None:
        """Note that the files of the work get no caption."""
        self.failed += [(each.file.name, reason) for each in work.files]


def caption_footage(
    source: Path,
    options: CaptionOptions,
    load: Callable[[], Describe],
    count_tokens: Callable[[str], int],
) -> dict[str, str]:
    """Write the captions that are missing below `source`; returns those that were written, by file.

    load          the captioner, called only if there is something to caption
    count_tokens  tokens of a caption for the model's text encoder

    After a kill the same call goes on with the files that have none yet. ValueError if nothing can be captioned.
    """
    records = Records(source)
    captioned, rejects = read_captions(source, records)
    writer = _Writer(records, options)
    works, kept = _works(captioned, options, writer)
    new = [work for work in works if (made := records.made(work.made_from)) is None or not _reuse(writer, work, made)]
    if new:
        describe = load()
        with tqdm(total=sum(len(work.files) for work in new), desc="caption", unit="file") as bar:
            for work, caption in _described(new, describe, options, writer):
                writer.write(work, caption)
                bar.update(len(work.files))
    _say(source, writer, kept, [reject.name for reject in rejects], count_tokens)
    if writer.failed and not writer.counts["written"] and not kept:
        name, reason = writer.failed[0]
        raise ValueError(
            f"source={source}: none of {len(writer.failed)} files could be captioned (first: {name} {reason})"
        )
    return writer.captions


def _reuse(writer: _Writer, work: _Work, made: Record) -> bool:
    """Write a caption that was made before, and lost its text file or has another name now."""
    writer.write(work, made.caption)
    writer.counts["from the record"] += len(work.files)
    return True


def _works(
    captioned: Sequence[Captioned], options: CaptionOptions, writer: _Writer
) -> tuple[list[_Work], Counter[str]]:
    """What is to be captioned, files with the same bytes together; and how many captions stay, by who wrote them."""
    works, kept = dict[str, _Work](), Counter[str]()
    for each in captioned:
        rewritten = {"none": True, "caption.py": options.recaption != "none", "person": options.recaption == "all"}
        if not rewritten.get(each.origin, False):
            kept[each.origin] += 1
            continue
        try:
            sha256 = each.file.digest()
        except OSError as error:
            writer.failed.append((each.file.name, f"cannot be read ({error.strerror})"))
            continue
        made_from = options.made_from(sha256)
        if each.origin == "caption.py" and each.made_from == made_from:
            kept[each.origin] += 1
            continue
        works.setdefault(sha256, _Work(sha256, made_from, [])).files.append(each)
    return list(works.values()), kept


def _described(
    works: Sequence[_Work], describe: Describe, options: CaptionOptions, writer: _Writer
) -> Iterator[tuple[_Work, str]]:
    """Each work with its caption; videos and pictures are batches of their own."""
    by_file = {work.files[0].file.name: work for work in works}
    waiting: dict[bool, list[tuple[_Work, Shown]]] = {True: [], False: []}
    with closing(shown_frames([work.files[0].file for work in works], options.frames, options.decode)) as decoded:
        for file, shown in decoded:
            work = by_file[file.name]
            if isinstance(shown, str):
                writer.fail(work, shown)
                continue
            batch = waiting[shown.rate > 0]
            batch.append((work, shown))
            if len(batch) == options.batch_size:
                yield from _answered(batch, describe, options.template, writer)
                batch.clear()
    for batch in waiting.values():
        yield from _answered(batch, describe, options.template, writer)


def _answered(
    batch: Sequence[tuple[_Work, Shown]], describe: Describe, template: Template, writer: _Writer
) -> Iterator[tuple[_Work, str]]:
    if not batch:
        return
    shown = [each for _, each in batch]
    answers = describe(shown, [template.prompt(is_video=each.rate > 0) for each in shown])
    for (work, _), (text, is_cut) in zip(batch, answers, strict=True):
        caption = template.finished(text, is_cut=is_cut)
        if not caption:
            writer.fail(work, "got an answer without text")
            continue
        writer.counts["cut"] += is_cut
        if template.trigger.lower() not in text.lower():
            writer.counts["without the trigger word"] += 1
        yield work, caption


def _say(
    source: Path, writer: _Writer, kept: Counter[str], rejects: Sequence[str], count_tokens: Callable[[str], int]
) -> None:
    """Print the summary: every file is counted once."""
    written, counts = writer.counts["written"], writer.counts
    total = written + sum(kept.values()) + len(writer.failed) + len(rejects)
    origins = {
        "caption.py": "captioned before",
        "person": "with a person's caption",
        "table": f"with a caption in {table_of(source)}",
        "tar": "in tars",
    }
    parts = [f"{written} captioned now", *(f"{kept[key]} {words}" for key, words in origins.items() if kept[key])]
    parts += [f"{len(writer.failed)} that cannot be captioned"] if writer.failed else []
    parts += [f"{len(rejects)} that shard.py rejects (first: {rejects[0]})"] if rejects else []
    say(f"{source}: {total} files = {' + '.join(parts)}")
    if counts["cut"]:
        say(
            f"  {counts['cut']} answers reached max_tokens={writer.options.max_tokens} and were cut after their last "
            "whole sentence, if they had one; give a smaller words=, or a larger max_tokens="
        )
    if counts["without the trigger word"]:
        say(f"  {counts['without the trigger word']} answers lacked the trigger word; their captions begin with it")
    lengths = {name: count_tokens(caption) for name, caption in writer.captions.items()}
    long = [name for name, length in lengths.items() if length > TEXT_LENGTH]
    if long:
        say(
            f"  {len(long)} captions have more than {TEXT_LENGTH} tokens, and what follows is not read in training "
            f"({_named(long)}); shorten them, or give a smaller words= and recaption=own"
        )
    for name, reason in writer.failed[:NAMED]:
        say(f"  {name} {reason}")
    if writer.failed:
        say("  shard.py needs a caption for each of these too: write it, remove the file, or give caption.missing=skip")
    say(f"  python caption.py source={source} review=true shows them")


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
