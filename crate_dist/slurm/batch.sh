# What a job's batch script does when its ranks end: start them again at once, put the job back into the queue, or stop.
#
# executor.py puts this before submitit's srun, which then is the function below; and before this the set-up lines, before
# these tell.sh, and before that the settings:
# crate_run_dirs (of each task of an array), crate_submissions (where the logs of all jobs lie, a folder for each),
# crate_requeues, crate_restarts_in_place, crate_signal_delay_s, crate_device_fault, crate_stopped,
# crate_needs_a_person, crate_lost_the_run, crate_stop_request (the name of the file that asks a run to stop),
# crate_notify (a command of the user's, or nothing), crate_stuck_after (minutes), crate_python, crate_start_py, crate_ranks_per_node,
# and of the nodes that SLURM may give: crate_fewest_nodes, and crate_nodes_used, a table of how many train of how many.

case $(trap -p EXIT) in *crate_fail*) trap - EXIT ;; esac # no set-up line has ended the job
crate_logs=$crate_submissions/$crate_job
crate_restart=${SLURM_RESTART_COUNT:-0}
crate_told_to_stop=no
crate_left_out= # nodes of this job that are not used any more
# Whether the ranks may leave a node that they could do with, for another. Not when that has just brought nothing.
crate_may_leave_nodes=yes
grep -q ' 0$' "$crate_logs/progress" 2>/dev/null || [ ! -e "$crate_logs/progress" ] || crate_may_leave_nodes=no
# The shell must live to see how srun ends: with a trap for TERM it goes on waiting for it.
trap 'crate_told_to_stop=yes' TERM

srun() {
    set +eu # of a set-up line
    local status crate_start=0
    while true; do
        if crate_is_asked_to_stop; then # before SLURM started this job, or since the ranks ended
            echo "crate-dist: not started, since it was asked to stop; \`launch/status.py resume\` goes on with it"
            return "$crate_stopped"
        fi
        crate_start=$((crate_start + 1))
        [ "$crate_start" -gt 1 ] || crate_watch_for_stalls
        crate_choose_nodes
        # For the lock of the run folder: which of this script's sruns this is, and how many of them have ended.
        export CRATE_START=$crate_start CRATE_ENDED_STEPS=$SLURM_JOB_ID.$crate_restart.$((crate_start - 1))
        export CRATE_MAY_LEAVE_NODES=$crate_may_leave_nodes
        echo "crate-dist start $crate_restart.$crate_start: on $SLURM_JOB_NODELIST"
        command srun "${crate_here[@]}" "$@"
        status=$?
        if [ "$status" -eq 0 ]; then
            crate_tell "done"
            return 0
        fi
        crate_look_at_logs
        [ -z "$crate_broken" ] || crate_find_others
        crate_note_progress "$status"
        crate_is_worth_it "$status" || return "$status"
        if crate_can_start_here "$status"; then
            crate_left_out=$(crate_together "$crate_left_out" "$crate_broken")
            echo "crate-dist: ended with status $status: starting the ranks again on the same nodes" \
                "${crate_left_out:+without $crate_left_out }($crate_start of at most $crate_restarts_in_place times)"
        else
            crate_requeue "$status"
            return "$status"
        fi
    done
}

# Sets crate_used, the first of the nodes, as many as train, and crate_here, by which srun takes them: nothing where all
# nodes of the job do.
crate_choose_nodes() {
    local given used
    crate_here=()
    mapfile -t given < <(crate_nodes | crate_without "$crate_left_out")
    used=${crate_nodes_used[${#given[@]}]:-${#given[@]}}
    crate_used=$(crate_together "${given[@]:0:used}")
    [ "${#crate_nodes_used[@]}" -gt 1 ] || return
    crate_here=(
        "--nodes=$used" "--nodelist=$crate_used"
        "--ntasks=$((used * crate_ranks_per_node))" "--ntasks-per-node=$crate_ranks_per_node"
    )
    [ "$used" -eq "${#given[@]}" ] || echo "crate-dist: the global batch divides over $used nodes, and not over" \
        "${#given[@]}; idle: ${given[*]:used}"
}

# Whether to try again at all. A status below 64 is of what never came to train; in a later start than a job's first
# it is srun that could not start the ranks.
crate_is_worth_it() {
    local where="at step $crate_furthest"
    [ "$crate_furthest" -ge 0 ] || where="before the first checkpoint"
    [ "$1" -ne "$crate_lost_the_run" ] || return 1
    ! crate_stops || return 1
    if [ "$1" -eq "$crate_needs_a_person" ] || { [ "$1" -lt 64 ] && [ "$crate_is_first" = yes ]; }; then
        crate_fail "FAILED: it needs a person: ${crate_fault:-status $1}"
        return 1
    fi
    if [ "$crate_stuck" -ge 3 ]; then
        crate_fail "GIVEN UP: three starts in a row ended no further than one before them," \
            "$where. The last fault: ${crate_fault:-status $1}." \
            "The logs: $crate_logs and $crate_run_dir/logs. Once it is mended, the same command goes on."
        return 1
    fi
}

crate_is_asked_to_stop() {
    [ -e "$crate_run_dir/$crate_stop_request" ]
}

# Whether it was asked to stop, and says so.
crate_stops() {
    crate_is_asked_to_stop && echo "crate-dist: stopped, as it was asked to; \`launch/status.py resume\` goes on with it"
}

# From beside, until this script ends.
crate_watch_for_stalls() {
    [ -n "$crate_notify" ] || return 0
    CRATE_NOTIFY=$crate_notify "$crate_python" "$crate_start_py" -m crate_dist.watching.notify watch "$crate_run_dir" \
        --stuck-after "$crate_stuck_after" &
    crate_watcher=$!
    trap 'kill "$crate_watcher" 2>/dev/null' EXIT
}

# Whether a start ended because it was told to, which says nothing about what it can do.
crate_was_stopped() {
    [ "$1" -eq "$crate_stopped" ] || [ "$crate_told_to_stop" = yes ]
}

# Sets crate_furthest, the furthest checkpoint at which a start of this job ended, and crate_stuck, how many starts in
# a row have ended no further; kept in a file, which the next start of a job that was requeued reads.
crate_note_progress() {
    local file=$crate_logs/progress step=-1 folder
    crate_is_first=no
    for folder in "$crate_run_dir"/checkpoints/step-*/; do
        folder=${folder%/}
        folder=${folder##*/step-}
        folder=${folder%%.*} # one that has replaced another of the same step has a number behind it
        case $folder in '' | *[!0-9]*) continue ;; esac
        [ $((10#$folder)) -gt "$step" ] && step=$((10#$folder))
    done
    if [ -z "${crate_furthest:-}" ]; then
        read -r crate_furthest crate_stuck <"$file"
    fi 2>/dev/null
    case $crate_furthest:$crate_stuck in
        *[!0-9:-]* | :* | *:) crate_furthest=$step crate_stuck=0 crate_is_first=yes ;;
        *)
            if [ "$step" -gt "$crate_furthest" ]; then
                crate_furthest=$step crate_stuck=0
            elif ! crate_was_stopped "$1"; then
                crate_stuck=$((crate_stuck + 1))
            fi
            ;;
    esac
    mkdir -p "$crate_logs"
    echo "$crate_furthest $crate_stuck" >"$file.new" && mv "$file.new" "$file"
}

# Sets crate_fault, what the ranks of this start say of why they ended, and crate_broken, the nodes of those that
# show a broken device, or say that another node would do. Only names that SLURM has for this job's nodes are believed.
# A rank that TERM has ended had not yet come to answer it: where no other has ended for a reason of its own, the step
# was told to stop, which this script hears of only where SLURM tells it too.
crate_look_at_logs() {
    local faults node kind said
    faults=$(start="$crate_restart.$crate_start:" device="$crate_device_fault" stopped="$crate_stopped" awk '
        FNR == 1 { mine = 0 }
        /^crate-dist start / { mine = ($3 == ENVIRON["start"]); rank = $5; node = $8; next }
        !mine || FILENAME in broken || /^[-0-9]+ [0-9:]+ W (replaced|left out of) / { next } # samples have the names that they have
        /^crate-dist unfit: / { broken[FILENAME] = node "\tunfit\t" substr($0, 19); next }
        $0 ~ ENVIRON["device"] { broken[FILENAME] = node "\tbroken\trank " rank " on node " node ": " $0 }
        /^crate-dist fault: / && !(FILENAME in other) { other[FILENAME] = node "\tother\t" substr($0, 19) }
        /^crate-dist lost: / && lost == "" { lost = "\tother\t" substr($0, 18) }
        /^[-0-9]+ [0-9:]+ C / && !(FILENAME in other) { other[FILENAME] = node "\tother\t" $0 }
        /^srun: error: [^:]+: tasks? [-0-9,]+: / {
            if (!/Exited with/ && killed == "") killed = "\tother\t" substr($0, 14)
            ends[/: Terminated$/ ? "told" : $NF == ENVIRON["stopped"] ? "stopped" : "else"]
        }
        END {
            for (file in broken) { print broken[file]; ends["else"] }
            for (file in other) { if (!(file in broken)) print other[file]; ends["else"] }
            print killed
            print lost
            if (("told" in ends) && !("else" in ends) && lost == "") print "\ttold\t"
        }' "$crate_logs"/*_log.out 2>/dev/null)
    ! echo "$faults" | grep -q "^	told	" || crate_told_to_stop=yes
    crate_fault=$(echo "$faults" | grep -m 1 . | cut -f 3 | cut -c 1-1000)
    crate_broken=
    for node in $(crate_nodes); do
        for kind in "broken:shows a broken device" "unfit:is unfit"; do
            said=$(echo "$faults" | grep -m 1 "^$node	${kind%%:*}	" | cut -f 3 | cut -c 1-1000)
            [ -n "$said" ] || continue
            crate_broken=$(crate_together "$crate_broken" "$node")
            echo "crate-dist: node $node ${kind#*:}: $said"
            break
        done
    done
}

# Whether others are there to take the place of crate_broken, which is emptied where not. Sets crate_all_broken, the
# nodes that this job is not to run on, with those of before.
crate_find_others() {
    local facts before required left all
    if [[ $crate_used == *,* ]] && [ "$crate_broken" = "$crate_used" ]; then
        echo "crate-dist: no node is excluded: all of them are like that, so it may be the program"
        crate_broken= crate_may_leave_nodes=no
        return
    fi
    facts=$(scontrol --oneliner show job "$crate_job")
    before=$(crate_fact ExcNodeList) required=$(crate_fact ReqNodeList)
    if [ -n "$required" ] && crate_list "$crate_broken" | grep -qxF "$(crate_list "$required")"; then
        echo "crate-dist: node $crate_broken is not excluded: the job asks for $required"
        crate_broken= crate_may_leave_nodes=no
        return
    fi
    all=$(crate_together "$before" "$crate_left_out" "$crate_broken")
    left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format="%N %f %G" \
        --states=idle,allocated,mixed,completing | crate_that_fit | crate_without "$all" | grep -c .)
    if [ "$left" -lt "$crate_fewest_nodes" ]; then
        echo "crate-dist: node $crate_broken is not excluded: without $all there are too few in this partition that fit the job"
        crate_broken= crate_may_leave_nodes=no
        return
    fi
    crate_all_broken=$all
}

# One of the job's facts, which scontrol has written in one line.
crate_fact() {
    echo "$facts" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | grep -vxF "(null)"
}

# Of lines of nodes, their features and their devices, the nodes that have what the job asks for, and are in its
# reservation. Of features that are counted, or the same for all nodes, any one will do here.
crate_that_fit() {
    local reserved
    reserved=$(scontrol --oneliner show reservation "${SLURM_JOB_RESERVATION:-none}" 2>/dev/null |
        sed -n 's/.* Nodes=\([^ ]*\).*/\1/p')
    features=$(crate_fact Features | sed 's/\*[0-9]*//g; s/[][()]//g') devices=$(crate_fact TresPerNode) awk '
        BEGIN {
            wanted = split(ENVIRON["features"], all, "&")
            devices = split(ENVIRON["devices"], device, ",")
        }
        {
            fits = 1
            for (i = 1; i <= wanted; i++) {
                any = 0
                for (j = split(all[i], one, "|"); j; j--) any += index("," $2 ",", "," one[j] ",") > 0
                fits = fits && any
            }
            for (i = 1; i <= devices; i++) {
                name = device[i]
                sub(/^gres[:\/]/, "", name)
                sub(/[:=][0-9]+$/, "", name)
                fits = fits && index("," $3, "," name ":")
            }
            if (fits) print $1
        }' | if [ -n "${SLURM_JOB_RESERVATION:-}" ]; then grep -xF "$(crate_list "$reserved")"; else cat; fi
}

# Writes a list of nodes a node a line.
crate_list() {
    scontrol show hostnames "$1"
}

# Joins lists of nodes.
crate_together() {
    printf '%s\n' "$@" | grep . | paste -sd ,
}

# Leaves out the lines that are among the nodes of a list.
crate_without() {
    if [ -n "$1" ]; then
        grep -vxF "$(crate_list "$1")"
    else
        cat
    fi
}

crate_nodes() {
    crate_list "$SLURM_JOB_NODELIST"
}

# Whether to start the ranks again in this allocation, because a queue can take hours. Not when that has just brought
# nothing: other nodes may.
crate_can_start_here() {
    local facts end left
    [ "$crate_start" -le "$crate_restarts_in_place" ] && ! crate_was_stopped "$1" || return 1
    [ "$crate_stuck" -eq 0 ] || [ -n "$crate_broken" ] || return 1
    left=$(crate_nodes | crate_without "$(crate_together "$crate_left_out" "$crate_broken")" | grep -c .)
    [ -z "$crate_broken" ] || [ "$left" -ge "$crate_fewest_nodes" ] || return 1
    facts=$(scontrol --oneliner show job "$crate_job") && crate_is_running "$facts" || return 1
    end=$(echo "$facts" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
    if end=$(date -d "$end" +%s 2>/dev/null); then # else there is no limit
        [ $((end - $(date +%s))) -gt $((crate_signal_delay_s + 120)) ] || return 1
    fi
    crate_ranks_are_gone && crate_nodes_answer "$left" && ! crate_was_stopped "$1"
}

# srun may have ended before its ranks, which would meet those of the next.
crate_ranks_are_gone() {
    local second steps
    for second in {1..30}; do
        steps=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i) &&
            ! echo "$steps" | grep -q "^$crate_job\.[0-9]" && return
        sleep 1
    done
    return 1
}

crate_nodes_answer() {
    local without
    without=$(crate_together "$crate_left_out" "$crate_broken")
    timeout 60 srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpus-per-task=1 \
        ${without:+--exclude="$without"} --output=/dev/null true
}

# Not one that was cancelled, nor one that SLURM has started elsewhere while this node was out of reach.
crate_is_running() {
    echo "$1" | grep -q "JobState=RUNNING .*Restarts=$crate_restart "
}

crate_requeue() {
    local pause facts
    trap '' TERM # SLURM sends it to this script, and to what it is running, as soon as the job is requeued
    ! crate_stops || return
    if [ "$crate_restart" -ge "$crate_requeues" ]; then
        facts=$(scontrol --oneliner show job "$crate_job") && ! crate_is_running "$facts" && return
        crate_fail "ended with status $1, and not requeued: it was $crate_restart times already, and" \
            "cluster.requeues is $crate_requeues; the same command goes on from the newest checkpoint"
        return
    fi
    for pause in 0 2 6 18; do # a scheduler that is busy answers a little later
        sleep "$pause"
        ! crate_stops || return # which has SLURM refuse the requeue
        facts=$(scontrol --oneliner show job "$crate_job") || continue
        crate_is_running "$facts" || return
        echo "crate-dist: ended with status $1: requeueing"
        scontrol requeue "$crate_job" || continue
        [ -z "$crate_left_out$crate_broken" ] || crate_exclude
        return
    done
    crate_stops || crate_fail "FAILED: SLURM did not take the job back into its queue; the same command goes on from its newest checkpoint"
}

# SLURM takes a list of nodes for a job that is not running, and takes it for the whole list.
crate_exclude() {
    local pause
    for pause in 0 2 6; do
        sleep "$pause"
        if scontrol update JobId="$crate_job" ExcNodeList="$crate_all_broken"; then
            echo "crate-dist: node $(crate_together "$crate_left_out" "$crate_broken") is excluded from now on" \
                "(in all: $crate_all_broken)"
            return
        fi
    done
    echo "crate-dist: SLURM did not exclude node $crate_all_broken"
}
