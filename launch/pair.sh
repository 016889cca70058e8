#!/usr/bin/env bash
# Train both experts of a pair as two jobs, one after the other: for engines that hold one model per job (DeepSpeed).
# bash launch/pair.sh launch/accelerate/zero2.yaml data.shards=DIR [train.py's other settings]
# Then: python export.py run=RUN,RUN with the two runs' names, which train.py says.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "error: give one of launch/accelerate/*.yaml first, then train.py's settings" >&2
    exit 2
fi
file=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for expert in high_noise low_noise; do
    accelerate launch --config_file "$file" "$here/train.py" "$@" expert="$expert"
done
