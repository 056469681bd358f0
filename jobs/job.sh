# shellcheck shell=bash
# What all job scripts share. They read it; nothing in it depends on a site (see env.sh).
#
#   begin                 the environment, the launcher, and a banner that says what runs where
#   start_mps             NVIDIA's MPS on each node, until the job ends
#   on_ranks COMMAND      run a command on all ranks
#   train OUT [ARGUMENT]  train in the folder OUT; returns the run's exit code, or ends the job, which goes on later
#
# A run's own record (`gala-mpi status`) tells how it has ended: launchers may say 0 after a signal, or 137 of one rank
# that was killed.
set -euo pipefail

# So many starts in a row that come no further are the last; so many that only wait for another job's run, too.
most_idle=3 most_held=20
# What LSF queues a job again for (#BSUB -Q). A run's own exit codes are others.
lsf_again=85

here="${here:?}" # the folder of this file, by the script that reads it
# Told of the time limit; told that the job is cancelled or preempted; the launcher of the ranks, while there is one.
warned="" ended="" ranks_pid="" passed_on="" last_resort=""
# Given by a script that is for several runs: the folder of all, and that it is for an array.
folder="" array=""
timer="" notes="" about_job=""
trap 'warned=1; pass_on' USR1
trap 'ended=1; pass_on' TERM
# What is to be done at the end.
leaving=()
trap leave EXIT

leave() {
    local act
    for act in ${leaving[@]+"${leaving[@]}"}; do eval "$act" || :; done
} 2> /dev/null

say() { echo "job: $*"; }

refuse() {
    echo "$*" >&2
    exit 2
}

# The words of a text, into `words`; quotes keep some together, and nothing is run or expanded.
words=()
# shellcheck disable=SC2034  # the script that asks reads them
words_of() {
    mapfile -t words < <(xargs -r printf '%s\n' <<< "$1")
}

# Sleep in a way that a signal's trap does not wait for.
pause() {
    sleep "$1" &
    wait "$!" || :
}

# Do something some seconds later, unless this script has ended by then.
later() {
    (
        trap 'kill "$!"; exit' TERM
        sleep "$1" &
        wait "$!"
        shift
        "$@"
    ) 2> /dev/null &
    leaving+=("kill $!")
}

# Ask Slurm about this job as it is now. Member 3 of array 7 is 7_3: 7 is all of it.
ask() {
    local tries
    for ((tries = 0; tries < 3; ++tries)); do
        about_job=$(scontrol show job "$job" 2> /dev/null) && break
        pause 1
    done
}

# What it said when it was last asked, such as the JobState; nothing if it said nothing.
fact() {
    local said
    said=$(tr ' ' '\n' <<< "$about_job" | sed -n "s|^$1=||p" | head -n 1)
    case "$said" in "(null)" | None | N/A | Unknown) ;; *) printf '%s' "$said" ;; esac
}

# Give it what the job script was given: it may have to be submitted again.
begin() {
    submitted=("$@")
    # Modules and environments are written for shells that bear with them.
    set +eu
    # shellcheck source=jobs/env.sh
    source "$here/env.sh" || refuse "jobs/env.sh: ends with an error"
    if [[ -n "$environment" ]]; then
        if [[ ! -e "$environment/bin/activate" ]]; then
            refuse "GALA_MPI_ENV: $environment is no virtual environment; set it to the one that gala-mpi is installed in"
        fi
        # shellcheck source=/dev/null
        source "$environment/bin/activate"
    fi
    set -eu
    command -v gala-mpi > /dev/null || refuse "gala-mpi: not found; see GALA_MPI_ENV in jobs/env.sh"
    case "$again" in auto | resubmit | no) ;; *) refuse "GALA_MPI_AGAIN: $again; expected auto, resubmit or no" ;; esac
    case "$how" in auto | srun | mpirun) ;; *) refuse "GALA_MPI_LAUNCHER: $how; expected auto, srun or mpirun" ;; esac
    find_the_ranks
    # Libraries must not start threads of their own on top. From 22.05 on srun takes over no --cpus-per-task of its job.
    export OMP_NUM_THREADS="$cores" SRUN_CPUS_PER_TASK="$cores"
    # What sbatch --export=NONE leaves behind would keep the environment from the ranks.
    unset SLURM_EXPORT_ENV
    choose_launcher
    say "$(date '+%Y-%m-%d %H:%M:%S %Z'), $name $job, restart $restarts"
    say "$ranks ranks of $cores core(s) on $nodes"
    say "$library, started by: ${launcher[*]}"
}

# Which scheduler, job and start this is, and how many ranks on which nodes.
find_the_ranks() {
    restarts=0
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        scheduler=slurm job=$SLURM_JOB_ID name="$SLURM_JOB_NAME" nodes="${SLURM_JOB_NODELIST:-}"
        restarts="${SLURM_RESTART_COUNT:-0}" cores="${SLURM_CPUS_PER_TASK:-$cores}"
        if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
            job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
            [[ -n "$array" ]] || refuse "--array: all members would be the same run; use jobs/array.sbatch"
        fi
        # With --ntasks-per-node alone, some versions of Slurm set no number of tasks.
        ranks="${SLURM_NTASKS:-$((${SLURM_NNODES:-0} * ${SLURM_NTASKS_PER_NODE:-0}))}"
        [[ "$ranks" != 0 ]] ||
            refuse "SLURM_NTASKS: is not set, nor SLURM_NNODES and SLURM_NTASKS_PER_NODE; add #SBATCH --ntasks=<ranks>"
    elif [[ -n "${PBS_JOBID:-}" ]]; then
        scheduler=pbs job=$PBS_JOBID name="$PBS_JOBNAME" ranks=$(wc -l < "$PBS_NODEFILE")
        nodes=$(sort -u "$PBS_NODEFILE" | paste -sd, -)
    elif [[ -n "${LSB_JOBID:-}" ]]; then
        scheduler=lsf job=$LSB_JOBID name="$LSB_JOBNAME" ranks=$LSB_DJOB_NUMPROC nodes="${LSB_MCPU_HOSTS:-}"
    else
        refuse "this is no job of Slurm, PBS or LSF: submit it with sbatch, qsub or bsub"
    fi
    number=${job//[^0-9A-Za-z]/-}
}

choose_launcher() {
    local own fitting offered="" by_name kind
    library=$(python -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(" ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0").split()))' 2>&1) ||
        refuse "no MPI library can be loaded (${library##*$'\n'}): load your site's in jobs/env.sh, or pip install mpich"
    library=${library##*$'\n'}
    # The signal that its own launcher passes on.
    around=() passed=USR1
    case "$library" in
        *"Open MPI"*) kind=openmpi own=(mpirun --enable-recovery -n "$ranks") fitting=pmix ;;
        # Intel's mpirun is a script that passes no signal on.
        *Intel*) kind=intel own=(mpiexec.hydra -n "$ranks") fitting=pmi2 ;;
        *CRAY*) kind=cray own=(aprun -n "$ranks") fitting=cray_shasta ;;
        *MVAPICH*) kind=mvapich own=(mpirun -n "$ranks") fitting=pmi2 ;;
        *) kind=mpich own=(mpirun -disable-auto-cleanup -n "$ranks") fitting=pmi2 ;;
    esac
    if [[ "$how" == auto ]]; then
        how=mpirun
        if [[ $scheduler == slurm ]]; then offered=$(srun --mpi=list 2>&1) || :; fi
        by_name="(^|[[:space:]])$fitting([[:space:]]|$)"
        # Who has chosen a PMI means srun. With pmix Slurm ends a step that has lost a rank: Open MPI's own does not.
        if [[ "$pmi" != auto ]]; then
            how=srun
        elif [[ "$offered" =~ $by_name ]] && ! { [[ $kind == openmpi ]] && command -v mpirun > /dev/null; }; then
            how=srun
        fi
    fi
    if [[ "$pmi" == auto ]]; then pmi=$fitting; fi
    if [[ "$how" == srun ]]; then
        # Ranks that survive the death of another go on.
        launcher=(srun --mpi="$pmi" --kill-on-bad-exit=0 --cpus-per-task="$cores")
    else
        launcher=("${own[@]}")
        # Under it ranks pay no heed to SIGUSR1, by which MPICH tells of another's death.
        if [[ $kind == mpich ]]; then around=(sh "$here/outlive.sh") passed=TERM; fi
    fi
}

start_mps() {
    # A daemon that was killed leaves its files.
    local folder="/tmp/mps-$number-$restarts" each tries
    each=(srun --mpi=none --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --overlap)
    if ! command -v nvidia-cuda-mps-control > /dev/null; then
        say "nvidia-cuda-mps-control: not found; ranks that share a GPU take turns on it"
        return
    fi
    export CUDA_MPS_PIPE_DIRECTORY="$folder" CUDA_MPS_LOG_DIRECTORY="$folder/log"
    # By a step that lasts as long as the job: Slurm ends what a step leaves behind. It goes after the ranks: a job that is
    # preempted tells all steps. It serves all GPUs of the node, by their own numbers.
    # shellcheck disable=SC2016  # the step's own shell expands it
    "${each[@]}" bash -c 'trap "" TERM; unset CUDA_VISIBLE_DEVICES
        rm -rf "$CUDA_MPS_PIPE_DIRECTORY"; mkdir -p "$CUDA_MPS_LOG_DIRECTORY" && exec nvidia-cuda-mps-control -f' &
    leaving+=("kill -KILL $!" "${each[*]} rm -rf $folder")
    # shellcheck disable=SC2016
    if "${each[@]}" bash -c 'for ((i = 0; i < 150; ++i)); do
        [[ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ]] && exit; sleep 0.2; done; exit 1'; then
        say "MPS runs on $nodes"
    else
        say "MPS did not start on all nodes within 30 s (its log: $folder/log); ranks that share a GPU take turns on it"
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
}

on_ranks() {
    take_a_new_step
    "${launcher[@]}" ${around[@]+"${around[@]}"} "$@"
}

# What a later start of this job is to know: steps that were taken, starts in a row that came no further, and that waited.
read_notes() {
    notes="$runs/.job-$number" steps=0 idle="${GALA_MPI_IDLE:-0}" held="${GALA_MPI_HELD:-0}"
    if [[ "$restarts" != 0 && -e "$notes" ]]; then read -r steps idle held < "$notes" || :; fi
}

write_notes() {
    mkdir -p "$runs" && echo "$steps $idle $held" > "$notes" || :
} 2> /dev/null

drop_notes() {
    rm -f "$notes"
    rmdir "$runs" || :
} 2> /dev/null

# MPICH names files in /dev/shm by job and step. A job that was queued again has the number that it had, so its step must be
# another than all before: what killed ranks have left is in nobody's way then.
taken=0
take_a_new_step() {
    [[ "$how" == srun ]] || return 0
    [[ -n "$notes" ]] || read_notes
    for (( ; taken < steps; ++taken)); do
        srun --mpi=none --nodes=1 --ntasks=1 --cpus-per-task=1 true || :
    done
    steps=$((taken + 1)) taken=$((taken + 1))
    write_notes
}

# Exit code, last segment, steps and state of the run in $out, by its own record; nothing if there is none.
read_run() {
    run_code="" run_segment="" run_steps=0 run_state=""
    read -r run_code run_segment run_steps run_state < <(gala-mpi status "$out" --only code segment steps state 2> /dev/null) || :
}

train() {
    local given waited code
    out=$1
    shift
    for given in "$@"; do
        if [[ "$given" == --out* || "$given" == --resume* ]]; then
            refuse "$given: set GALA_MPI_OUT to the run's folder instead; a job that is queued again resumes it by itself"
        fi
    done
    watch_the_limit
    read_notes
    read_run
    steps_before=$run_steps
    # It had ended when this job was queued again.
    if [[ "$restarts" != 0 && "$run_code" =~ ^(0|3|4)$ ]]; then
        say "$out: has ended already"
        return "$run_code"
    fi
    code=6
    for ((waited = 0; ; waited += 30)); do
        if [[ -n "$warned$ended" ]]; then
            code=75
            break
        fi
        if [[ "$run_code" != 6 ]]; then
            one_start "$@"
            [[ "$code" == 6 ]] || break
        fi
        ((waited < held_s)) || break
        say "another job goes on with $out, or its ranks do: waiting for it"
        pause 30
        read_run
        steps_before=$run_steps
    done
    finish "$code"
}

# Start the ranks, and wait for them; sets `code`, of `train`, to the run's exit code.
one_start() {
    local before=$run_segment launched=127 said where=(--out "$out") left
    if [[ -e "$out/run.json" ]]; then where=(--resume "$out"); fi
    take_a_new_step
    # The launcher itself: signals are for it.
    "${launcher[@]}" ${around[@]+"${around[@]}"} gala-mpi train "${where[@]}" "$@" &
    ranks_pid=$! passed_on=""
    # Told before there was a launcher: it has run nothing yet.
    if [[ -n "$warned$ended" && -z "$passed_on" ]]; then kill -TERM "$ranks_pid" 2> /dev/null || :; fi
    # A signal ends the wait, but not the ranks. 127: the wait before has told it.
    while
        wait "$ranks_pid" && said=0 || said=$?
        [[ "$said" == 127 ]] || launched=$said
        [[ "$said" -gt 128 ]] && kill -0 "$ranks_pid" 2> /dev/null
    do :; done
    ranks_pid=""
    read_run
    # A launcher may end before its ranks do.
    for ((left = 0; left < 60; left += 5)); do
        [[ "$run_code" == 6 && "$run_segment" != "$before" ]] || break
        pause 5
        read_run
    done
    code=$launched
    if [[ -n "$run_segment" && "$run_segment" != "$before" ]]; then
        # Killed, and by nobody that this job knows of: the launcher says more.
        if [[ "$run_state" != killed || -n "$warned$ended" || "$launched" -le 6 ]]; then code=$run_code; fi
    elif [[ "$code" == 0 ]]; then
        # It never began, whatever the launcher says; a line above says why.
        code=1
    fi
    # Told, or preempted, before it could begin, or by a signal that it did not survive.
    if [[ "$code" -gt 6 ]] && { [[ -n "$warned$ended" ]] || preempted; }; then code=75; fi
}

# Launchers pass signals on to the ranks. To a step of srun Slurm has sent its own SIGTERM already. Ranks that do not end,
# since one died while MPI started, say, are ended before the limit.
pass_on() {
    # Another signal would end them at once.
    [[ -n "$ranks_pid" && -z "$passed_on" ]] || return 0
    if [[ -n "$warned" || "$how" != srun ]]; then
        passed_on=1
        kill -"$passed" "$ranks_pid" 2> /dev/null || :
    fi
    if [[ -n "$warned" && -z "$last_resort" ]]; then
        last_resort=1
        later $((warned_s - 30)) kill -TERM "$ranks_pid"
        later $((warned_s - 20)) kill -KILL "$ranks_pid"
    fi
}

preempted() {
    [[ $scheduler == slurm ]] || return 1
    ask
    [[ -n "$(fact PreemptTime)" ]]
}

# End the job, if it is to go on later; else the run's exit code.
finish() {
    local code=$1
    if { [[ "$code" == 75 ]] || [[ "$code" == 6 ]]; } && may_go_again "$code"; then
        if [[ "$code" == 6 ]]; then held=$((held + 1)); else held=0; fi
        if [[ "$code" == 6 ]] || ((run_steps > steps_before)); then idle=0; else idle=$((idle + 1)); fi
        if ((idle >= most_idle)); then
            say "the last $most_idle starts came no further than $run_steps steps: not queued again; their lines say why"
        elif ((held >= most_held)); then
            say "another job has gone on with $out for $most_held starts of this one: not queued again"
        else
            go_again
        fi
    fi
    drop_notes
    gala-mpi status "$out" 2> /dev/null | sed 's/^/job: /' || :
    return "$code"
}

# Whether the job was told of its limit, preempted, or waits for another; not if a user has cancelled it, nor if it begins
# again already.
may_go_again() {
    local state
    if [[ $scheduler != slurm ]]; then
        [[ -z "$ended" && (-n "$warned" || "$1" == 6) ]]
        return
    fi
    ask
    state=$(fact JobState)
    # Slurm does not answer: who was told of the limit tries.
    if [[ -z "$state" ]]; then
        [[ -n "$warned" && -z "$ended" ]]
        return
    fi
    [[ "$(fact Restarts)" == "$restarts" ]] || return 1
    # In its time of grace a job that is preempted still runs, and only its ranks have been told.
    if [[ "$state" == RUNNING && -n "$(fact PreemptTime)" ]]; then return 0; fi
    [[ -n "$warned" || "$1" == 6 ]] && [[ "$state" == RUNNING || "$(fact Reason)" == TimeLimit ]]
}

# Ends the job; returns if it cannot go on later.
go_again() {
    local tries said=""
    write_notes
    case "$again-$scheduler" in
        no-*)
            say "go on with it: submit it again with GALA_MPI_OUT=$out"
            return
            ;;
        auto-slurm)
            say "goes on later: into the queue again. Slurm calls that CANCELLED ... DUE TO JOB REQUEUE"
            # It ends this script by SIGTERM.
            trap '' TERM
            for ((tries = 0; tries < 5; ++tries)); do
                said=$(scontrol requeue "$job" 2>&1) && exit 75
                pause 2
            done
            say "could not be queued again (${said:-no reason was given}); set GALA_MPI_AGAIN=resubmit"
            ;;
        auto-lsf)
            say "goes on later: LSF queues it again for exit code $lsf_again (#BSUB -Q)"
            exit "$lsf_again"
            ;;
        *)
            say "goes on later: submitted again"
            if resubmit; then exit 75; fi
            say "could not be submitted again"
            ;;
    esac
    say "go on with it: submit it again with GALA_MPI_OUT=${folder:-$out}"
}

# Submit the job again, with the environment of this one. What sbatch was given in place of the script's own header is given
# again as far as it is here.
resubmit() {
    local options=() field value script
    # An array has a folder for all of its members.
    export GALA_MPI_OUT="${folder:-$out}" GALA_MPI_IDLE="$idle" GALA_MPI_HELD="$held"
    case "$scheduler" in
        slurm)
            ask
            for field in Account Partition QOS TimeLimit:time NumNodes:nodes NumTasks:ntasks CPUs/Task:cpus-per-task; do
                value=$(fact "${field%%:*}")
                # A number of nodes may be a span.
                if [[ $field == NumNodes* ]]; then value=${value%%-*}; fi
                field=${field##*:}
                if [[ -n "$value" ]]; then options+=("--${field,,}=$value"); fi
            done
            # Slurm tells the script with its arguments.
            script=$(sed -n 's/^ *Command=//p' <<< "$about_job")
            script=${script%" ${submitted[*]-}"}
            if [[ -n "$array" ]]; then options+=(--array="$SLURM_ARRAY_TASK_ID"); fi
            env -u SLURM_RESTART_COUNT sbatch "${options[@]}" --job-name="$name" --dependency="afterany:$job" \
                "$script" ${submitted[@]+"${submitted[@]}"}
            ;;
        pbs) qsub -V -W depend=afterany:"$job" "$here/train.pbs" ;;
        lsf) bsub < "$here/train.lsf" ;;
    esac
}

# Refuse a time limit that leaves no time to train. PBS warns of none: there this job tells itself.
watch_the_limit() {
    local limit="" days limit_s
    case "$scheduler" in
        slurm)
            ask
            limit=$(fact TimeLimit)
            ;;
        pbs) limit=$(qstat -f "$job" 2> /dev/null | sed -n 's/^ *Resource_List.walltime = //p') || : ;;
        lsf) return 0 ;;
    esac
    if ! [[ "$limit" =~ ^([0-9]+-)?([0-9]+):([0-9]+):([0-9]+)$ ]]; then
        if [[ $scheduler == pbs ]]; then say "qstat tells no walltime: this job will not be told of its limit"; fi
        return 0
    fi
    days=${BASH_REMATCH[1]%-}
    limit_s=$((10#${days:-0} * 86400 + 10#${BASH_REMATCH[2]} * 3600 + 10#${BASH_REMATCH[3]} * 60 + 10#${BASH_REMATCH[4]}))
    if ((limit_s < 2 * warned_s)); then
        refuse "time limit: $limit cannot be used; expected at least $((2 * warned_s / 60)) minutes: the job is told" \
            "$warned_s s before its limit, and is to train before that"
    fi
    if [[ $scheduler == pbs && -z "$timer" ]]; then
        timer=1
        later $((limit_s - warned_s - SECONDS)) kill -USR1 $$
    fi
}
