# Who is told of a job's end, and that a set-up line has ended it.
#
# executor.py puts this before the set-up lines, and before this the settings that batch.sh names.

# SLURM_JOB_ID of one task of an array is the whole array's: a requeue of it would be one of all tasks.
crate_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
crate_run_dir=${crate_run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}
# Until batch.sh takes over: a set-up line may exit, or fail after a `set -e`.
trap 'crate_fail "FAILED: a set-up line ended the job with status $?${crate_fault:+: $crate_fault}"' EXIT
trap 'trap - EXIT TERM; kill -TERM $$' TERM # cancelled, or to be requeued

# Says for good that it will not go on by itself, and tells the user.
crate_fail() {
    echo "crate-dist: $*"
    crate_tell failed "$*"
}

# Nothing that the user's command does, or that this Python lacks, is of concern to the run.
crate_tell() {
    [ -n "$crate_notify" ] || return 0
    CRATE_NOTIFY=$crate_notify timeout --kill-after=10 120 \
        "$crate_python" "$crate_start_py" -m crate_dist.watching.notify "$1" "$crate_run_dir" --fault "${2:-}" && return 0
    printf '{"event": "%s", "run": "%s", "fault": "%s"}\n' "$1" "$(crate_json "$crate_run_dir")" "$(crate_json "${2:-}")" |
        CRATE_EVENT=$1 CRATE_RUN=$crate_run_dir timeout --kill-after=10 60 /bin/sh -c "$crate_notify" ||
        echo "crate-dist: $1: the --notify command ended with $?"
}

crate_json() {
    printf %s "$1" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g'
}
