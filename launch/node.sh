#!/usr/bin/env bash
# One node's part of a launch on several nodes: each node runs this with the same words.
# bash launch/node.sh train expert=low_noise data.shards=DIR [train.py's other settings]
#
# In the environment:
# NODES           how many nodes
# NODE            which of them this is, from 0; under srun SLURM says it
# MASTER_ADDR     name or address of node 0
# PET_LOCAL_ADDR  name or address of this node, where the others cannot resolve its host name; SLURM says it
# and the values of launch/site.env. Without NODES this machine is the only one, and the launch takes a free port.
#
# The launcher is accelerate's, on torch's elastic agent: when a process dies, the agents of all nodes stop theirs and
# start all of them again, at most RESTARTS times, and the run goes on from its newest checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/site.sh"
nodes=${NODES:-1} node=${NODE:-${SLURM_NODEID:-0}}
if [ $# -lt 1 ] || [[ $1 == *=* ]]; then
    echo "error: give a command first, then its settings: node.sh train expert=low_noise ..." >&2
    exit 2
fi
for name in LAUNCH GPUS; do
    if [ -z "${!name:-}" ]; then
        echo "error: $name is not set; launch/site.env or the environment has to have it" >&2
        exit 2
    fi
done
file=$here/accelerate/$LAUNCH.yaml
if [ ! -f "$file" ]; then
    echo "error: LAUNCH=$LAUNCH: there is no $file" >&2
    exit 2
fi
if [ $((nodes * GPUS)) -eq 1 ]; then
    echo "one process: it needs no launcher, and RESTARTS has no effect"
    exec python -m wantrain "$@"
fi

# The agent hands these signals on to its processes, and waits so long for the checkpoint (torch reads PET_*).
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=${GRACE:-30}
export PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-${SLURMD_NODENAME:-}}
if [ "$nodes" -eq 1 ]; then
    MASTER_ADDR=localhost where=()
    MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    export PET_RDZV_ENDPOINT=$MASTER_ADDR:$MASTER_PORT
elif [ -n "${MASTER_ADDR:-}" ] && [ -n "${MASTER_PORT:-}" ]; then
    where=(--num_machines "$nodes" --machine_rank "$node" --main_process_ip "$MASTER_ADDR"
        --main_process_port "$MASTER_PORT" --rdzv_conf "is_host=$((node == 0)),join_timeout=900,read_timeout=300")
    if grep -q '^parallelism_config:' "$file"; then # hybrid shards: each node is a group
        if [ "$GPUS" -eq 1 ]; then
            echo "error: LAUNCH=$LAUNCH: the GPUs of a node share its weights, and GPUS=1; take LAUNCH=fsdp2" >&2
            exit 2
        fi
        where+=(--parallelism_config_dp_replicate_size "$nodes" --parallelism_config_dp_shard_size "$GPUS")
    fi
else
    echo "error: NODES=$nodes: MASTER_ADDR and MASTER_PORT have to say where node 0 is" >&2
    exit 2
fi
# Each start has a store of its own, which its main process keeps. The agents would share theirs with the processes: those
# of a later start would find keys of the one before, and a node that comes back would wait for ever (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# By the agents' store the processes agree who says an error (wantrain/util/distributed.py).
export WANTRAIN_STORE=$MASTER_ADDR:$MASTER_PORT
exec accelerate launch --config_file "$file" --num_processes "$((nodes * GPUS))" "${where[@]}" \
    --rdzv_backend c10d --max_restarts "${RESTARTS:-0}" --monitor_interval 1 -m wantrain "$@"
