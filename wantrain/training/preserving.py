"""What preserve= puts around a loss."""

from __future__ import annotations

from wantrain.losses import LossFunction, Preserving
from wantrain.sampling import read_prompts


def preserving(loss: LossFunction, *, weight: float, prompt: str | None, prompts: str | None) -> LossFunction:
    """The loss, with the difference from the base under class prompts beside it unless its `weight` is 0.

    prompt   the class prompt; None: the empty caption
    prompts  a file with one per line, in its place
    ValueError if both are given, or for a file that `read_prompts` refuses.
    """
    if prompt is not None and prompts is not None:
        raise ValueError("preserve.prompt and preserve.prompts both give class prompts; give one of them")
    if weight == 0:
        return loss
    return Preserving(loss, weight=weight, prompts=[prompt or ""] if prompts is None else read_prompts(prompts))
