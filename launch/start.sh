#!/usr/bin/env bash
# From a folder of footage to files that other programs load: shard, encode, train, export. For rented machines.
# bash launch/start.sh FOOTAGE RECIPE [train.py's other settings]
#
# FOOTAGE    folder of videos and images with their captions
# RECIPE     options of conf/recipe, with commas between: character,lora_24gb
# settings   weights=, revision= and parts.* reach encode.py too
# LAUNCH     in the environment: train in several processes by launch/accelerate/$LAUNCH.yaml, such as ddp or fsdp2
#
# Data and results are in data/RUN and runs/RUN below the current folder. The same command goes on where it stopped.
set -euo pipefail
if [ $# -lt 2 ] || [[ $2 == *=* ]]; then
    echo "error: give a folder of footage and a recipe: start.sh FOOTAGE RECIPE [settings of train.py]" >&2
    exit 2
fi
footage=$1 recipe=$2
shift 2
run=${recipe//,/_} base=()
for setting in "$@"; do
    case $setting in
        run=*) run=${setting#run=} ;;
        weights=* | revision=* | parts.*=*) base+=("$setting") ;;
        data.shards=*) echo "error: leave out $setting: start.sh makes the shards from $footage" >&2; exit 2 ;;
    esac
done
training=(train "recipe=$recipe" "data.shards=data/$run/latents" "$@" "run=$run")

# `docker stop` signals this shell alone: hand it on, so that training ends with a checkpoint.
job=
trap '[ -z "$job" ] || kill -TERM "$job"' TERM INT
step() {
    echo "+ $*"
    "$@" &
    job=$!
    local code=0
    wait "$job" || code=$?
    if kill -0 "$job" 2>/dev/null; then # a signal ended the wait, and the command is still ending
        code=0
        wait "$job" || code=$?
    fi
    job=
    [ "$code" -eq 0 ] || exit "$code"
}

# Before hours of work: settings, memory and time. A wrong setting ends it here.
plan=$(python -m wantrain "${training[@]}" dry_run=true)
echo "$plan"
model=$(sed -n '/^model:/,/^[^ ]/s/^  name: //p' <<<"$plan")
step python -m wantrain shard "model=$model" "source=$footage" "out=data/$run/videos"
step python -m wantrain encode "model=$model" "shards=data/$run/videos" "out=data/$run/latents" "${base[@]}"
if [ -n "${LAUNCH:-}" ]; then
    file=$(python -m wantrain path "launch/accelerate/$LAUNCH.yaml")
    step accelerate launch --config_file "$file" -m wantrain "${training[@]}"
else
    step python -m wantrain "${training[@]}"
fi
step python -m wantrain export "run=$run" dtype=bf16 "out=runs/$run/pipeline"
