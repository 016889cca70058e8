"""Graphics cards: memory, arithmetic and bandwidth, from the makers' data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

#: Words of a device's name that say nothing of its speed: maker, brand, memory and socket.
NEUTRAL = re.compile(r"NVIDIA|TESLA|GEFORCE|GENERATION|SXM\d?|HBM\d\w?|\d+GB")


@dataclass(frozen=True)
class Card:
    """One model of card.

    memory     bytes that CUDA gives a process on an otherwise idle card
    peak       operations per second, dense bfloat16 with float32 sums
    bandwidth  bytes per second of its own memory
    link       bytes per second to and from the host, in one direction, that a pinned copy reaches
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    link: float


def _cards() -> Mapping[str, Card]:
    """By name: GiB that CUDA reports, TFLOP/s, GB/s of memory; PCIe 4 x16 copies at 25 GB/s, PCIe 5 x16 at 50."""
    rows = (
        ("B200", 178, 2250, 8000, 50), ("GH200", 94.5, 989, 4000, 350), ("H200", 139.8, 989, 4800, 50),
        ("H200 NVL", 139.8, 835, 4800, 50), ("H100", 79.1, 989, 3350, 50), ("H100 NVL", 93.1, 835, 3900, 50),
        ("H100 PCIE", 79.1, 756, 2000, 50), ("A100", 79.1, 312, 2039, 25), ("A100 PCIE", 79.1, 312, 1935, 25),
        ("A100 40GB", 39.4, 312, 1555, 25), ("A40", 44.4, 149.7, 696, 25), ("A10", 22.1, 125, 600, 25),
        ("L40S", 44.4, 362, 864, 25), ("L40", 44.4, 181, 864, 25), ("L4", 22.1, 121, 300, 25),
        ("RTX 6000 ADA", 47.4, 364, 960, 25), ("RTX A6000", 47.4, 155, 768, 25),
        ("RTX 5090", 31.3, 209, 1792, 50), ("RTX 5080", 15.5, 112.6, 960, 50),
        ("RTX 4090", 23.5, 165, 1008, 25), ("RTX 4080", 15.7, 97.5, 717, 25), ("RTX 4070", 11.6, 58.3, 504, 25),
        ("RTX 3090", 23.5, 71, 936, 25), ("RTX 3060", 11.6, 25.5, 360, 25),
    )  # fmt: skip
    return {
        name: Card(name, memory * 2**30, peak * 1e12, bandwidth * 1e9, link * 1e9)
        for name, memory, peak, bandwidth, link in rows
    }


CARDS = _cards()


def card_model(name: str) -> str:
    """A device's name without the words that say nothing of its speed: "NVIDIA A100-SXM4-80GB" is an "A100".

    What is left must be a key of CARDS as a whole: an "L40" is no "L4", and a "RTX 4090 LAPTOP GPU" or a "MIG" slice of
    a card is not the card.
    """
    words = re.split(r"[\s-]+", name.upper())
    return " ".join(word for word in words if not NEUTRAL.fullmatch(word))


def find_card(asked: str) -> Card:
    """The card that `gpu=` asks for, as people write it: h100, a100-80, rtx4090, "L40S". ValueError for an unknown one.

    A number of GB (`gpu=24GB`) is a card of that memory whose speed is not known: its rates are 0.
    """
    if size := re.fullmatch(r"(\d{1,3})\s*(GB|GIB)?", asked.strip().upper()):
        return Card(f"{size[1]} GB", int(size[1]) * 0.98 * 2**30, 0.0, 0.0, 0.0)
    names = {_compact(name): card for name, card in CARDS.items()}
    wanted = _compact(asked)
    for spelling in (wanted, f"RTX{wanted}", re.sub(r"(24|32|48|80|94|141)$", "", wanted)):
        if spelling in names:
            return names[spelling]
    raise ValueError(f"gpu={asked} is not known; choose one of {', '.join(CARDS)}, or give its memory, e.g. gpu=24GB")


def planned_card(asked: str | None) -> Card | None:
    """The card to plan for: the one that gpu= names, else the smallest that is here; None where there is none."""
    if asked is not None:
        return find_card(asked)
    if not torch.cuda.is_available():
        return None
    cards = (torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count()))
    here = min(cards, key=lambda each: each.total_memory)
    listed = CARDS.get(card_model(here.name), Card(here.name, 0.0, 0.0, 0.0, 0.0))
    return replace(listed, memory=float(here.total_memory))


def _compact(name: str) -> str:
    return re.sub(r"[\s_-]|GB$", "", name.upper())
