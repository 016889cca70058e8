"""The files of launch/: what accelerate, SLURM, Kubernetes and SkyPilot will read in them."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_slurm
import torch.distributed.run
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils.launch import prepare_multi_gpu_env

from wantrain import config
from wantrain.training.engine.accelerator import _HYDRAS

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
ENGINES = sorted(path.stem for path in (LAUNCH / "accelerate").glob("*.yaml"))
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*")])
#: Options of SLURM's sbatch that the scripts give.
SBATCH = {
    "nodes", "gpus-per-node", "gpus-per-task", "cpus-per-task", "mem", "time", "job-name", "ntasks", "ntasks-per-node",
    "signal", "requeue", "open-mode", "output", "array",
}  # fmt: skip


def site():
    """The values of launch/site.env."""
    lines = (LAUNCH / "site.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def launcher(*words):
    """What accelerate's launcher makes of these words, after it has read its file."""
    args = accelerate_launch.launch_command_parser().parse_args(words)
    return accelerate_launch._validate_launch_command(args)[0]


def rows():
    """The commands of the tables in launch/README.md that start `accelerate launch` or train.py."""
    text = (LAUNCH / "README.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    return re.findall(r"`((?:accelerate launch --config_file|python train\.py|bash launch/node\.sh)[^`]+)`", table)


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate_file(engine):
    """Every key is accelerate's, the values reach its launcher, and none of them is an option of train.py."""
    file = yaml.safe_load((LAUNCH / f"accelerate/{engine}.yaml").read_text())
    assert file.keys() <= {field.name for field in dataclasses.fields(ClusterConfig)}
    known = {action.dest for action in accelerate_launch.launch_command_parser()._actions}
    inner = {**file.get("deepspeed_config", {}), **file.get("fsdp_config", {})}
    assert inner.keys() <= known
    args = launcher("--config_file", str(LAUNCH / f"accelerate/{engine}.yaml"), "train.py")
    assert all(getattr(args, key) == value for key, value in inner.items()), engine
    for key, allowed, _ in _HYDRAS.values():
        assert str({**file, **inner}.get(key, next(iter(allowed)))).lower() in allowed, key
    if "zero" in engine:  # else the first node would start the others by ssh
        assert inner["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(LAUNCH).as_posix())
def test_script_is_bash(script):
    """bash parses every script; one that is started stops at the first error."""
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    started = script.suffix == ".sbatch" or script.name in {"node.sh", "pair.sh", "start.sh"}
    assert text.startswith("#!/usr/bin/env bash\n") == started == ("\nset -euo pipefail\n" in text)


@pytest.mark.parametrize("name", ["shard", "encode", "train", "sample"])
def test_sbatch_options(name):
    """Each job is put back before its limit and after a node's failure, writes on into its log, and names its command."""
    script = LAUNCH / f"slurm/{name}.sbatch"
    given = stand_in_slurm.directives(script)
    text = script.read_text(encoding="utf-8")
    assert given.keys() <= SBATCH and text.count("#SBATCH --") == len(given)
    assert given["signal"] == "B:USR1@300" and "requeue" in given and given["open-mode"] == "append"
    assert int(given["signal"].partition("@")[2]) > int(site()["GRACE"]) and given["job-name"] == name
    last_directive = text.rindex("#SBATCH")
    assert text.index("set -euo") > last_directive  # SLURM reads directives up to the first command


def test_site_values():
    """Plain values, such as bash, kubectl and sky read alike; every one is used by a script, or is another program's."""
    text = "".join(path.read_text(encoding="utf-8") for path in [*SCRIPTS, *LAUNCH.glob("*.yaml")])
    for key, value in site().items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", key) and not re.search(r"[\"'$#\s]", value), key
        assert key == "HF_HOME" or re.search(rf"\b{key}\b", text), key
    assert site()["LAUNCH"] in ENGINES


def test_kubernetes_job():
    """A PyTorchJob of which all pods are alike, with the site's values, a shared disk, and settings that train.py takes."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"].keys() == {"runPolicy", "pytorchReplicaSpecs"}
    kinds = job["spec"]["pytorchReplicaSpecs"]
    assert kinds.keys() == {"Master", "Worker"} and kinds["Master"]["replicas"] == 1
    assert kinds["Master"]["template"] == kinds["Worker"]["template"]
    pod = kinds["Master"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > int(site()["GRACE"])
    (container,) = pod["containers"]
    assert container["name"] == "pytorch" and container["envFrom"] == [{"configMapRef": {"name": "wantrain-site"}}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(site()["GPUS"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    command, *settings = container["args"]
    assert command == "train" and config.compose("train", settings).run == "mine"
    subprocess.run(["bash", "-n", "-c", container["command"][2]], check=True)


def test_skypilot_task():
    """A task of known fields, whose script runs node.sh with settings that train.py takes."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run"}
    assert task["resources"].keys() == {"accelerators", "use_spot", "job_recovery"}
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    words = shlex.split(task["run"].splitlines()[-1])
    assert words[:4] == ["exec", "bash", "launch/node.sh", "train"]
    assert config.compose("train", words[4:]).run == "mine"


@pytest.fixture
def fake(tmp_path):
    """fake("accelerate"): a program of that name that says its words and some of the environment."""
    (tmp_path / "bin").mkdir()
    said = 'printf "%s\\n" "$@"; printf "env %s\\n" "$PET_SIGNALS_TO_HANDLE" "$PET_SHUTDOWN_TIMEOUT" "$WANTRAIN_STORE" "${PET_RDZV_ENDPOINT:-}"'

    def make(name, text=said):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return make


def run_node(tmp_path, *words, **own):
    """node.sh with programs of tmp_path/bin: its exit code, lines and errors."""
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **own}
    ended = subprocess.run(["bash", LAUNCH / "node.sh", *words], env=env, cwd=tmp_path, capture_output=True, text=True)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


def test_node_of_several(fake, tmp_path):
    """The launcher is given the job's nodes and this one's number; torch's agent gets the store's address, the restarts,
    the signals that it hands on, and the time for a checkpoint."""
    fake("accelerate")
    where = {"NODES": "3", "SLURM_NODEID": "2", "MASTER_ADDR": "first", "GPUS": "4", "RESTARTS": "5", "GRACE": "100"}
    code, lines, _ = run_node(tmp_path, "train", "expert=low_noise", "run=a b", **where)
    assert code == 0 and lines[-6:-4] == ["expert=low_noise", "run=a b"] and lines[0] == "launch"
    args = launcher(*lines[1:-4])
    assert args.training_script == "wantrain" and args.module and args.num_processes == 12
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint) == ("3", "4", "first:29500")
    assert (args.rdzv_backend, args.rdzv_conf, args.max_restarts) == (
        "c10d",
        "is_host=0,join_timeout=900,read_timeout=300",
        5,
    )
    assert lines[-4:] == ["env SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "env 100", "env first:29500", "env "]
    flags = {action.dest for action in torch.distributed.run.get_args_parser()._actions}
    assert {
        "signals_to_handle",
        "shutdown_timeout",
        "rdzv_endpoint",
        "local_addr",
    } <= flags  # which torch reads as PET_*


@pytest.mark.parametrize(("engine", "sizes"), [("fsdp2_hybrid", [3, 8]), ("fsdp2", [1, 1])])
def test_groups_of_nodes(engine, sizes, fake, tmp_path):
    """With hybrid shards each node is a group, however many there are; without them there are no groups."""
    fake("accelerate")
    where = {"NODES": "3", "NODE": "0", "MASTER_ADDR": "first", "GPUS": "8", "LAUNCH": engine}
    _, lines, _ = run_node(tmp_path, "train", "run=r", **where)
    args = launcher(*lines[1:-4])
    assert [args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size] == sizes
    assert args.num_processes == 24 and args.use_parallelism_config == (engine == "fsdp2_hybrid")


def test_only_node(fake, tmp_path):
    """Alone, a launch takes any free port, so that two of them fit on a machine."""
    fake("accelerate")
    said = [run_node(tmp_path, "train", "run=r", LAUNCH="ddp", GPUS="2")[1] for _ in range(2)]
    assert all(re.fullmatch(r"env localhost:\d+", lines[-1]) for lines in said) and said[0][-1] != said[1][-1]
    lines = said[0]
    assert "--num_machines" not in lines and lines[-1] == lines[-2]
    assert launcher(*lines[1:-4]).num_processes == 2


def test_one_process(fake, tmp_path):
    """One process is started without a launcher, which is said, for nothing restarts it."""
    fake("python", 'printf "%s\\n" "$@"')
    code, lines, _ = run_node(tmp_path, "train", "run=r", GPUS="1")
    assert code == 0 and "RESTARTS has no effect" in lines[0] and lines[1:] == ["-m", "wantrain", "train", "run=r"]


@pytest.mark.parametrize(
    ("words", "own", "message"),
    [
        ([], {}, "give a command first"),
        (["run=r"], {}, "give a command first"),
        (["train"], {"LAUNCH": "zero9"}, "LAUNCH=zero9: there is no"),
        (["train"], {"GPUS": ""}, "GPUS is not set"),
        (["train"], {"NODES": "2"}, "MASTER_ADDR and MASTER_PORT have to say where node 0 is"),
        (["train"], {"NODES": "2", "MASTER_ADDR": "a", "GPUS": "1", "LAUNCH": "fsdp2_hybrid"}, "take LAUNCH=fsdp2"),
        (["train"], {"SITE": "none.env"}, "SITE=none.env: there is no such file"),
    ],
)
def test_node_refuses(words, own, message, tmp_path):
    """What is missing is one line, and exit code 2."""
    code, _, error = run_node(tmp_path, *words, **own)
    assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_site_file(tmp_path):
    """A site's file gives what the environment lacks, values with '=' and blanks whole; its venv comes first in PATH."""
    (tmp_path / "mine.env").write_text("# comment\n\nONE=a=b c\nTWO=file\n#THREE=no\nVENV=/venv\nlower=no")
    script = f'. {LAUNCH}/site.sh; echo "$ONE|$TWO|${{THREE:-}}|${{lower:-}}|$PATH"'
    env = {"SITE": str(tmp_path / "mine.env"), "TWO": "environment", "PATH": os.environ["PATH"]}
    ended = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == f"a=b c|environment|||/venv/bin:{os.environ['PATH']}"


def launcher_of(command, fake, tmp_path, **own):
    """What the launcher is given by a command of a pod or a rented machine, which has this environment."""
    fake("accelerate")
    (tmp_path / "launch").symlink_to(LAUNCH)
    env = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **own,
    }
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    given = launcher(*lines[1 : lines.index("env SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")])
    prepare_multi_gpu_env(given)
    return given


def test_pod_starts(fake, tmp_path):
    """A worker's pod, with all variables that the training operator (1.9) sets in it, starts its part of the launch."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    operator = {"RANK": "1", "WORLD_SIZE": "2", "PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"}
    for key, value in {"MASTER_ADDR": "wantrain-master-0", "MASTER_PORT": "23456"}.items():
        operator |= {key: value, f"PET_{key}": value}
    command = [*container["command"], *container["args"]]
    given = launcher_of(command, fake, tmp_path, **(site() | operator))
    assert (given.num_machines, given.num_processes, given.rdzv_endpoint) == (2, 16, "wantrain-master-0:23456")
    assert given.rdzv_conf.startswith("is_host=0,") and given.training_script_args[-1] == "run=mine"


def test_rented_machine_starts(fake, tmp_path):
    """The second of two machines, with SkyPilot's variables, starts its part of the launch."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    rented = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "4", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    own = {f"SKYPILOT_{key}": value for key, value in rented.items()}
    given = launcher_of(["bash", "-c", task["run"]], fake, tmp_path, **own)
    assert (given.num_machines, given.num_processes, given.rdzv_endpoint) == (2, 8, "10.0.0.1:29500")
    assert given.rdzv_conf.startswith("is_host=0,") and given.training_script_args[-1] == "run=mine"


@pytest.fixture
def job(fake, tmp_path):
    """job(script, signal, **environment): a batch script around job.sh, to which the signal is sent once it has begun; its
    exit code and lines. `requeue NAME` is a line for each call of scontrol."""
    fake("scontrol", 'echo "$@"')
    fake("srun", 'exec "$@"')
    fake("python", 'printf "%s\\n" "rank ${RANK:-none}" "$@"')

    def run(script, sent=None, **own):
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **own}
        text = f"set -euo pipefail; . launch/slurm/job.sh; {script}"
        batch = subprocess.Popen(["bash", "-c", text], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = [batch.stdout.readline().strip()] if sent else []
        if sent:
            batch.send_signal(sent)
        out, _ = batch.communicate(timeout=20)
        return batch.returncode, [*lines, *out.splitlines()]

    return run


#: A step that ends by SIGUSR1 with a code of its own, as a run does after its checkpoint.
STEP = "step bash -c 'trap \"echo saved; exit 138\" USR1; echo begun; sleep 20 >/dev/null & wait'"


def test_step_at_the_limit(job):
    """SIGUSR1 reaches the step, whose end is waited for, and the job goes back into the queue."""
    said = "the time is up: job {} goes back into the queue"
    assert job(STEP, 10) == (138, ["begun", "saved", said.format(7), "requeue 7"])
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # the last task of an array has the array's number
    assert job(STEP, 10, **array)[1][2:] == [said.format("7_3"), "requeue 7_3"]


def test_step_that_is_not_requeued(job):
    """A step that ends by itself, well or not, and one that SLURM ends, leave the queue alone; so does the last time."""
    cores = "step srun bash -c 'echo $SRUN_CPUS_PER_TASK'"
    assert job(cores, SLURM_CPUS_PER_TASK="12") == (0, ["12"])
    assert job("step true") == (0, []) and job("step bash -c 'exit 3'") == (3, [])
    assert job(STEP, 15) == (138, ["begun", "saved"])
    assert job(STEP, 10, SLURM_RESTART_COUNT="4", REQUEUES="4") == (138, ["begun", "saved"])
    finished = "step bash -c 'trap : USR1; echo begun; sleep 0.5 & wait; wait; exit 0'"
    assert job(finished, 10) == (0, ["begun"])


def test_part_of_an_array(job):
    """A task of an array makes a part, counted from 1, as one process; an array with gaps is refused, for its parts would
    not be all of the work.
    """
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    whole = {**array, "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7"}
    assert job("part encode out=x", **whole) == (0, ["rank none", "-m", "wantrain", "encode", "out=x", "part=4/8"])
    assert job("part sample run=r") == (0, ["rank none", "-m", "wantrain", "sample", "run=r"])
    assert job("part encode", **{**whole, "SLURM_ARRAY_TASK_MAX": "8"}) == (2, [])


def test_rows_of_other_commands():
    """accelerate's launcher has several processes for encode.py and sample.py as the page starts them."""
    text = (LAUNCH / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+\.py)` \| `accelerate launch (--num_processes) N (\w+\.py)", text, flags=re.M)
    assert [command for command, _, _ in found] == ["encode.py", "sample.py"]
    for command, flag, script in found:
        args = launcher(flag, "2", "--multi_gpu", script)  # which the launcher adds where it sees several GPUs
        assert args.training_script == script == command and args.num_processes == 2


@pytest.mark.parametrize("row", rows())
def test_row_is_understood(row):
    """accelerate's launcher takes the words of every row of launch/README.md, and has more than one process for it."""
    words = shlex.split(row)
    if words[0] != "accelerate":
        return
    args = launcher(*words[2:])
    assert args.training_script == "train.py" and (args.num_processes > 1 or "one_gpu" in row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in rows() if "node.sh" not in row])
def test_row_starts(row, tiny, environment, tmp_path):
    """Every row of launch/README.md trains, on CPU processes: with the CPU's twin of its launch file."""
    words = shlex.split(
        row.replace("launch/accelerate/", f"{LAUNCH}/accelerate/").replace("train.py", f"{ROOT}/train.py")
    )
    words = [re.sub(r"accelerate/(?!one_gpu)(\w+\.yaml)", r"accelerate/cpu_\1", word) for word in words]
    words = [sys.executable if word == "python" else word for word in words]
    if words[0] == "accelerate":
        words[:2] = [sys.executable, "-m", "accelerate.commands.launch"]
    settings = [*tiny.train, "init=scratch", "steps=2", "batch_size=8", "validation=off", "run=r"]
    ended = subprocess.run(
        [*words, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/r/checkpoints/step_000002/state.json").is_file()


def test_rows_are_all_engines():
    """The rows of launch/README.md have every engine, and every launch file stands on the page."""
    named = {Path(word).stem for row in rows() for word in row.split() if word.startswith("launch/accelerate")}
    assert named == {engine for engine in ENGINES if not engine.startswith("cpu_")}
