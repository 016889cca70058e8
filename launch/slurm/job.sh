# Read by the scripts beside it, not started: the values of the site, and what ends a job before its time is up.
. launch/site.sh
# srun does not take this over from sbatch (since SLURM 22.05): its tasks would have one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Run a step of the job. Five minutes before the limit SLURM sends SIGUSR1 (--signal): the step is sent it too, ends
# with what it has finished, and the job goes back into the queue. SIGTERM (scancel, a preemption) ends the step in the
# same way, and SLURM decides what becomes of the job. srun would end its tasks at once for a SIGTERM of its own.
step() {
    local code=0
    job='' ending='' sent=''
    trap 'end_step limit' USR1
    trap 'end_step stopped' TERM
    "$@" &
    job=$!
    [ -z "$ending" ] || end_step "$ending" # the signal came before there was a step
    wait "$job" || code=$?
    while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, and the step is still ending
        code=0
        wait "$job" || code=$?
    done
    trap - USR1 TERM
    if [ "$ending" = limit ] && [ "$code" -ne 0 ]; then
        requeue
    fi
    return "$code"
}

# Note why the step shall end, and say so to it, once: a second signal would kill its processes.
end_step() {
    ending=${ending:-$1}
    if [ -n "$job" ] && [ -z "$sent" ]; then
        sent=yes
        kill -USR1 "$job" 2>/dev/null || true
    fi
}

# Put this job, or this task of an array, back into the queue.
requeue() {
    local times=${SLURM_RESTART_COUNT:-0} name=$SLURM_JOB_ID
    if [ "$times" -ge "${REQUEUES:-50}" ]; then
        echo "error: the time is up, and the job was in the queue $times times (REQUEUES); submit it again" >&2
        return
    fi
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "the time is up: job $name goes back into the queue"
    scontrol requeue "$name"
}

# Refuse an array with gaps: its tasks would not be all parts of the work.
whole_array() {
    if [ "$SLURM_ARRAY_TASK_MIN" -ne 0 ] || [ "$SLURM_ARRAY_TASK_MAX" -ne $((SLURM_ARRAY_TASK_COUNT - 1)) ]; then
        echo "error: the array has to be 0-N without gaps, not $SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" >&2
        return 2
    fi
}

# This array task's part of a command that takes part=K/N: parts know nothing of each other.
part() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        whole_array || return
        set -- "$@" "part=$((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT"
    fi
    step srun python -m wantrain "$@"
}
