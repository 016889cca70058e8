"""A process that runs the project's commands, and stages of benchmarks/gpu.py, on the emulated device, each in a fork.

It imports everything once and takes a line of JSON per command on its input: {"cwd", "args", "fault", "result"}. The
fork executes the `fault`, Python that plants one, runs the command as conftest's `run_inside` does, writes what came of it to the file `result`, and the line is answered with
one of its own. A fork per command: torch knows a backend for the whole process, and imports take five seconds.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

import emulator  # noqa: E402
from preloaded import preload  # noqa: E402

DEVICE = emulator.install()


def load_conftest():
    """tests/conftest.py as a module."""
    spec = importlib.util.spec_from_file_location("conftest_of_commands", HERE.parent / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts(counter):
    """A counter as JSON has it: rows of kind, place, number."""
    return [[kind, where, number] for (kind, where), number in sorted(counter.items())]


def step_counter(take_step, steps):
    """`take_step` of the loop, with what each step reads and uploads put down in `steps`."""

    def counted(*args, **kwargs):
        with emulator.counted() as (reads, uploads):
            told = take_step(*args, **kwargs)
        steps.append({"reads": counts(reads), "uploads": counts(uploads)})
        return told

    return counted


def run_stage(folder, name):
    """A stage of benchmarks/gpu.py with its small shapes: what it measured and checked, as its output."""
    import gpu_stages.context

    module, _, function = name.partition(":")
    context = gpu_stages.context.Context(DEVICE, small=True, work=folder)
    context.note(**getattr(importlib.import_module(module), function)(context))
    checks = {check.name: check.passed for check in context.checks}
    told = json.dumps({"measured": context.measured, "checks": checks, "cases": context.cases}, default=str)
    return mock.Mock(returncode=0, stdout=told, stderr="")


def run(conftest, request):
    """One command on the device; what is known of it afterwards."""
    from accelerate.state import PartialState

    from wantrain.training import loop
    from wantrain.util import devices

    steps, folder = [], Path(request["cwd"])
    exec(request["fault"], {})
    on_device = mock.PropertyMock(return_value=DEVICE)
    with (
        mock.patch.object(devices, "choose", lambda name: DEVICE),
        mock.patch.object(PartialState, "default_device", on_device),
        mock.patch.object(loop, "take_step", step_counter(loop.take_step, steps)),
    ):
        if request["args"][0].startswith("gpu_stages."):
            ended = run_stage(folder, request["args"][0])
        else:
            ended = conftest.run_inside(folder, *request["args"], check=False)
    return {
        "returncode": ended.returncode,
        "stdout": ended.stdout,
        "stderr": ended.stderr,
        "steps": steps,
        "reads": counts(Counter(emulator.reads)),
        "uploads": counts(Counter(emulator.uploads)),
    }


def main():
    conftest = load_conftest()
    preload()  # what the commands import is there before the first fork
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                told = run(conftest, request)
            except BaseException:
                told = {"returncode": 1, "stdout": "", "stderr": traceback.format_exc(), "steps": []}
            Path(request["result"]).write_text(json.dumps(told), encoding="utf-8")
            os._exit(0)
        os.waitpid(child, 0)
        print("done", flush=True)


if __name__ == "__main__":
    main()
