"""Portions of a work unit of clips: rows that go through encode.py's pipeline together, in order, as tensors.

Tensor suffixes: B clips of one bucket, F frames, H W rows and columns of pixels, C channels: red, green, blue and, with
mask videos, the mask's brightness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrain.data.footage.decode_workers import Decoded
from wantrain.data.latents.conditioning import ConditioningInputs
from wantrain.data.latents.transfer import Transfer
from wantrain.data.latents.work_units import ClipRow, Row, WorkUnit
from wantrain.video import Frames


@dataclass(frozen=True)
class Entry:
    """A row to be written: from its `frames`, or rejected with a `reason`, or (neither) copied from an earlier tar.

    new  True if this run has tried to decode the row
    """

    row: ClipRow
    frames: Frames | None = None
    reason: str | None = None
    new: bool = False


@dataclass(frozen=True)
class Group:
    """Clips of one bucket that are encoded together.

    frames_BFHWC  uint8, on the host
    masks         of known pixels, for each mask type that is stored and drawn: boolean, broadcasting to (B, 1, F, H, W)
    """

    rows: list[ClipRow]
    frames_BFHWC: Tensor
    masks: list[Tensor]


@dataclass(frozen=True)
class Portion:
    """Entries of a work unit without their frames, which are in the groups; `last` marks its last portion."""

    unit: WorkUnit
    entries: list[Entry]
    groups: list[Group]
    last: bool


def entries(
    unit: WorkUnit, missing: set[str], decoded: Iterator[Decoded], rejected: Callable[[Row], str | None]
) -> Iterator[Entry]:
    """Every row of a work unit, in order. Rows whose identities are `missing` take the next item of `decoded`;
    after the first failure in a file its later rows fail too. `rejected` gives the reason of an earlier reject."""
    failed: dict[str, str] = {}  # reasons, by the file's key
    for row in unit.rows:
        assert isinstance(row, ClipRow)
        reason = rejected(row)
        if reason is not None or row.identity not in missing:
            yield Entry(row, reason=reason)
            continue
        reason, frames = failed.get(row.entry.key), None
        if reason is None:
            item = next(decoded)
            reason, frames = item.reason or None, item.frames
        if reason is not None:
            failed[row.entry.key] = reason
        yield Entry(row, frames, reason, new=True)


def parts(unit: WorkUnit, entries: Iterable[Entry], together: int) -> Iterator[tuple[list[Entry], bool]]:
    """Split a work unit's entries where the pixels to encode reach `together`: (entries, last part or not)."""
    part, pixels = list[Entry](), 0
    for count, entry in enumerate(entries, start=1):
        part.append(entry)
        pixels += 0 if entry.frames is None else _pixels(entry.row)
        last = count == len(unit.rows)
        if last or pixels >= together:
            yield part, last
            part, pixels = [], 0


def stage(
    unit: WorkUnit,
    part: list[Entry],
    last: bool,
    together: int,
    inputs: ConditioningInputs,
    transfer: Transfer,
) -> Portion:
    """Prepare a part for the device: stack the clips of each bucket, up to `together` pixels, and draw their masks."""
    groups, given = list[Group](), [entry for entry in part if entry.frames is not None]
    for bucket in dict.fromkeys(entry.row.bucket for entry in given):
        members = [entry for entry in given if entry.row.bucket == bucket]
        count = max(1, together // _pixels(members[0].row))
        for some in (members[at : at + count] for at in range(0, len(members), count)):
            groups.append(_group(some, inputs, transfer))
    return Portion(unit, [Entry(entry.row, None, entry.reason, entry.new) for entry in part], groups, last)


def _group(members: list[Entry], inputs: ConditioningInputs, transfer: Transfer) -> Group:
    rows, bucket = [entry.row for entry in members], members[0].row.bucket
    frames = transfer.stack([torch.from_numpy(entry.frames) for entry in members])
    drawn = inputs.draw([row.key for row in rows], (bucket.num_frames, bucket.height, bucket.width))
    return Group(rows, frames, [transfer.stack(masks) for masks in drawn])


def _pixels(row: ClipRow) -> int:
    """Pixels of all frames of a clip."""
    return row.bucket.num_frames * row.bucket.height * row.bucket.width
