"""Checks of the network: the Hugging Face hub, and the account of Weights & Biases. Training needs neither."""

from __future__ import annotations

import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from wantrain.doctor.finding import Finding, Options

HUB = "https://huggingface.co"
WANDB = "https://api.wandb.ai"


def check_hub(options: Options) -> Iterator[Finding]:
    """Whether the hub answers, within the timeout; and whether there is a token for repositories that ask for one."""
    hub = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        yield Finding("hub", "HF_HUB_OFFLINE is set: nothing is downloaded", "give weights=FOLDER, or unset it")
        return
    why = unreachable(hub, options.timeout)
    token = "HF_TOKEN" in os.environ or _hub_home().joinpath("token").is_file()
    if why is None:
        yield Finding(
            "hub", f"{hub} answers; {'a token is there' if token else 'no token, which Wan does not ask for'}"
        )
    else:
        yield Finding("hub", f"{hub} does not answer ({why})", "give weights=FOLDER with files from elsewhere")


def check_wandb(options: Options) -> Iterator[Finding]:
    """Whether tracker=wandb has a key to log with."""
    mode = os.environ.get("WANDB_MODE")
    server = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB)).hostname or ""
    if mode in {"offline", "disabled"}:
        yield Finding("wandb", f"WANDB_MODE={mode}")
    elif os.environ.get("WANDB_API_KEY"):
        yield Finding("wandb", "a key in WANDB_API_KEY")
    elif _has_login(server):
        yield Finding("wandb", f"a login for {server}")
    else:
        fix = "wandb login, or tracker=jsonl; without, tracker=wandb logs offline into the run's folder"
        yield Finding("wandb", "no login", fix)


def unreachable(url: str, timeout: float) -> str | None:
    """Why an address does not answer within `timeout` seconds, looking up its name included; None if it answers."""
    answers: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "wantrain"})
        try:
            urllib.request.urlopen(request, timeout=timeout).close()
            answers.append(None)
        except urllib.error.HTTPError:  # an answer too
            answers.append(None)
        except (OSError, ValueError) as error:
            answers.append(" ".join(str(getattr(error, "reason", error)).split()))

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no timeout
    thread.start()
    thread.join(timeout)
    return answers[0] if answers else f"no answer in {timeout:g} s"


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def _has_login(server: str) -> bool:
    """True if a netrc file has a login for a server."""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server) is not None
    return False
