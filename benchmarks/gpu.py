"""The project on a GPU, in one command for a person with a card: python benchmarks/gpu.py [--small] [--device cpu]

Stages run in order of worth, each in a process of its own with a limit of seconds: running out of memory, an error of
CUDA or a hang costs that stage and no other. After each its line is printed and gpu.json beside this file is written
anew, with all that is known: what was measured, each check with its tolerance, and each comparison with diffusers in
the format of result.py, with what was predicted of it. Random weights; no network. Without diffusers ours is measured
alone, and that is said.

  a  what the machine is, and its kernels of attention
  b  wan-tiny on the card follows the CPU: encode, train, resume, sample
  c  one A14B block, and eight with a LoRA beside diffusers'
  d  whole A14B LoRA steps; eight blocks compiled; VAE 2.1; whole steps of the 5B; eight blocks trained as a whole
  e  seconds by tokens; umT5-xxl; VAE 2.2; a base in 8 and 4 bits; swapped blocks

Limits sum to 300 s for (a) to (c) and to 900 s for all, meant for an H100. --within SECONDS starts no stage after that
time and cuts a limit to what is left; --add keeps the stages that the results have, and runs the others: so several
short leases of a machine make one file. `--small` (the default without a card) runs every stage on small shapes, which
a CPU does in minutes. Exit code 0: all passed; 1: something failed or took too long, or was not started.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import result

ROOT = Path(__file__).resolve().parent.parent
#: Lines of a failed stage's output that are kept.
LAST_WORDS = 20
#: Seconds without which no stage is started, and the width of a stage's name in its line.
LEAST, WIDTH = 10.0, 14


@dataclass(frozen=True)
class Stage:
    """A row of the table: its name, "module:function" of `stage(context) -> dict`, and its limit in seconds."""

    name: str
    function: str
    limit: float


STAGES = (
    Stage("machine", "gpu_stages.machine:machine", 20),
    Stage("attention", "gpu_stages.machine:attention", 40),
    Stage("encode", "gpu_stages.correctness:encode", 45),
    Stage("train", "gpu_stages.correctness:train", 55),
    Stage("resume", "gpu_stages.correctness:resume", 40),
    Stage("sample", "gpu_stages.correctness:sample", 25),
    Stage("block", "gpu_stages.transformer:block", 20),
    Stage("slice_lora", "gpu_stages.against:slice_lora", 55),
    Stage("step_81", "gpu_stages.against:step_81", 105),
    Stage("slice_compiled", "gpu_stages.against:slice_compiled", 130),
    Stage("vae_2_1", "gpu_stages.encoders:vae_2_1", 45),
    Stage("step_5b", "gpu_stages.against:step_5b", 70),
    Stage("slice_full", "gpu_stages.against:slice_full", 55),
    Stage("by_tokens", "gpu_stages.variants:by_tokens", 50),
    Stage("text", "gpu_stages.encoders:text", 30),
    Stage("vae_2_2", "gpu_stages.encoders:vae_2_2", 50),
    Stage("quantized", "gpu_stages.variants:quantized", 30),
    Stage("swap", "gpu_stages.variants:swap", 35),
)
#: Stages before this one are the first group.
FIRST_OF_REST = "step_81"


def run_here(options: argparse.Namespace) -> None:
    """The child's part: one stage in this process; what it found goes into the file `--kept` as it is found."""
    module, name = options.run.split(":")
    stage = getattr(importlib.import_module(module), name)
    import torch
    from gpu_stages.context import Context

    context = Context(torch.device(options.device), options.small, options.work, options.kept)
    context.note(**stage(context))


def run_apart(stage: Stage, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """One stage in a process group of its own, ended when its time or the seconds `left` are over; its result,
    whatever became of it.
    """
    kept, log = options.work / f"{stage.name}.json", options.work / f"{stage.name}.log"
    command = [sys.executable, __file__, "--run", stage.function, "--device", options.device, "--kept", str(kept)]
    command += ["--work", str(options.work), *(["--small"] if options.small else [])]
    limit, began = min(stage.limit * options.patience, left), time.monotonic()
    with log.open("w", encoding="utf-8") as said:
        child = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment(options.device), start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    found = {"seconds": round(time.monotonic() - began, 2), "limit": limit, **found_in(kept)}
    found["ended"] = "in time" if code == 0 else f"after {limit:g} s, its limit" if code is None else said_of(code)
    if code != 0:
        found["last_words"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_WORDS:]
    found["passed"] = code == 0 and all(check["passed"] for check in found["checks"])
    return found


def environment(device: str) -> dict[str, str]:
    """A child's environment: this checkout's wantrain, and no card where a CPU is measured."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **hidden}


def end(child: subprocess.Popen[bytes]) -> None:
    """End a stage and the commands that it started, which are its process group."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def found_in(kept: Path) -> dict[str, Any]:
    """What a stage has written down."""
    empty: dict[str, Any] = {"measured": {}, "checks": [], "cases": {}}
    return empty | json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else empty


def said_of(code: int) -> str:
    """An exit code in words."""
    return f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"


def line(stage: Stage, found: dict[str, Any]) -> str:
    """What is printed of a stage."""
    verdict = "passed" if found["passed"] else "FAILED"
    head = f"{stage.name:<{WIDTH}} {verdict}  {found['seconds']:6.1f} s of {found['limit']:g}"
    wrong = [
        f"{check['name']}: {check['measured']} (allowed {check['tolerance']}: {check['why']})"
        for check in found["checks"]
        if not check["passed"]
    ]
    if found["ended"] != "in time":
        wrong.append(f"ended {found['ended']}: {(found['last_words'] or ['it said nothing'])[-1]}")
    return "  ".join([head, *[text for text in (found["measured"].get("in_words"),) if text], *wrong])


def options_from(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what it leaves open decided by the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--small", action="store_true", help="small shapes; the default on a CPU")
    parser.add_argument("--only", help="names of stages, with commas between")
    parser.add_argument("--patience", type=float, default=1.0, help="every limit times this")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds for all stages together")
    parser.add_argument("--add", action="store_true", help="keep the stages that the results have; run the others")
    parser.add_argument(
        "--out", type=Path, help="the results; default: gpu.json here, with --small runs/gpu_small.json"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="a folder for what stages share; default: a temporary one")
    options = parser.parse_args(words)
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.small = options.small or options.device == "cpu"
    usual = Path("runs/gpu_small.json") if options.small else Path(__file__).with_suffix(".json")
    options.out = options.out or usual
    return options


def main(words: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages, tell and store what came of each; the exit code."""
    options = options_from(words)
    if options.run:
        run_here(options)
        return 0
    wanted = options.only.split(",") if options.only else [stage.name for stage in stages]
    if unknown := set(wanted) - {stage.name for stage in stages}:
        sys.exit(f"error: --only: no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in stages)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results, began = begun(options), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        options.work = (options.work or Path(scratch)).resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        for stage in (stage for stage in stages if stage.name in wanted and stage.name not in results["stages"]):
            left = options.within - (time.monotonic() - began)
            if left < LEAST:
                print(f"{stage.name:<{WIDTH}} not started: --within {options.within:g} leaves {max(0.0, left):.0f} s")
                continue
            found = run_apart(stage, options, left)
            results["cases"] |= {f"{stage.name}: {name}": case for name, case in found.pop("cases").items()}
            results["stages"][stage.name] = found
            options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            print(line(stage, found), flush=True)
    passed = [name in results["stages"] and results["stages"][name]["passed"] for name in wanted]
    print(f"{sum(passed)} of {len(passed)} stages passed; {options.out} has all of it", flush=True)
    return 0 if all(passed) else 1


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The results to which stages are added: with --add those that there are, else none but what they are of."""
    if options.add and options.out.is_file():
        stored: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8"))
        if stored["small"] != options.small or stored["machine"]["device"] != options.device:
            sys.exit(f"error: --add: {options.out} is of device {stored['machine']['device']}, small {stored['small']}")
        return stored
    found = result.record(
        __file__,
        protocol="a process per stage; comparisons in one process, in turn, in the order A B B A, by the device's time",
        shapes={"small": "sizes.SMALL_*"} if options.small else {"published": "sizes.py"},
        cases={},
        libraries=("torch", "triton", "diffusers", "peft", "accelerate", "transformers", "bitsandbytes"),
        device=options.device,
    )
    return {**found, "small": options.small, "stages": {}}


if __name__ == "__main__":
    sys.exit(main())
