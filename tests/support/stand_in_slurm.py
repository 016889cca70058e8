"""SLURM's commands on one machine, for scripts that need them: sbatch, srun and scontrol, as far as launch/slurm does.

The nodes of a job are processes on 127.0.0.1. `sbatch` waits for the job, and starts it again when it is requeued.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

#: Where a stand-in writes what a test wants to know: batch (its process), requeued, tasks (of srun, by node).
STATE = "STAND_IN_SLURM"


def install(folder):
    """Put the three commands into a folder; the environment in which a shell finds and needs them."""
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        file.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, STATE: str(folder)}


def directives(script):
    """The options of the #SBATCH lines: {"nodes": "2", "requeue": ""}."""
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", Path(script).read_text(encoding="utf-8"), flags=re.M)
    return dict(lines)


def state(name):
    return Path(os.environ[STATE]) / name


def sbatch(*words):
    """Run a job to its end. SIGUSR2: a node of it fails, so that all its processes die and SLURM puts it back."""
    given = dict(re.findall(r"--([\w-]+)=(\S*)", " ".join(word for word in words if word.startswith("--"))))
    script, *args = (word for word in words if not word.startswith("--"))
    options = {"nodes": "1", "ntasks-per-node": "1", **directives(script), **given}
    array = options.get("array")
    tasks = list(range(int(array.removeprefix("0-")) + 1)) if array else [None]
    return max([start_until_done(script, args, options, task, len(tasks)) for task in tasks])  # one after the other


def start_until_done(script, args, options, task, count):
    spooled = state("job.sh")  # SLURM runs a copy, in a folder of its own
    spooled.write_bytes(Path(script).read_bytes())
    failed = []
    signal.signal(signal.SIGUSR2, lambda *_: failed.append(kill_all()))
    for start in range(10):
        own = {"SLURM_JOB_ID": "7", "SLURM_NNODES": options["nodes"], "SLURM_JOB_NODELIST": "node[0-9]"}
        own |= {"SLURM_NTASKS": options["nodes"], "SLURM_RESTART_COUNT": str(start)}
        if task is not None:
            own |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(count)}
            own |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": str(count - 1)}
        state("requeued").unlink(missing_ok=True)
        batch = subprocess.Popen(["bash", spooled, *args], env={**os.environ, **own}, start_new_session=True)
        state("batch").write_text(str(batch.pid))
        code = batch.wait()
        if not state("requeued").is_file() and not (failed and "requeue" in options):
            return code
        failed.clear()
        print("stand-in: the job starts again", flush=True)
    return 99


def kill_all():
    """As when a node fails: SLURM ends the job's other processes too."""
    tasks = [int(line.split()[1]) for line in state("tasks").read_text().splitlines()]
    for process in [*tasks, int(state("batch").read_text())]:
        for each in [process, *descendants(process)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    return True


def descendants(process):
    """All processes below one."""
    found = [int(child) for child in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False
    ).stdout.split()]  # fmt: skip
    return [*found, *(each for child in found for each in descendants(child))]


def srun(*words):
    """A task on each node. SIGUSR1 goes to all tasks; SIGTERM kills them, as srun's manual says."""
    command = list(words)
    while command[0].startswith("--"):
        command.pop(0)
    nodes = int(os.environ["SLURM_NNODES"])
    tasks = []
    for node in range(nodes):
        own = {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"}
        own["SLURMD_NODENAME"] = "127.0.0.1"
        tasks.append(subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True))
    state("tasks").write_text("".join(f"{node} {task.pid}\n" for node, task in enumerate(tasks)))
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(*words):
    """`show hostnames` and `requeue`."""
    if words[:2] == ("show", "hostnames"):
        print("\n".join(["127.0.0.1"] * int(os.environ["SLURM_NNODES"])))
    elif words[0] == "requeue":
        state("requeued").write_text(words[1])
    else:
        return f"scontrol {' '.join(words)}: the stand-in does not know this"
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](*sys.argv[2:]))
