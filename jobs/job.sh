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
# Given by the script that reads this: the folder of this file.
here="${here:?}"
# Given by env.sh, as is `runs`.
environment="" how="" pmi="" again=""

# How long a job waits for another that goes on with its run. Its node's daemon may have died, and its ranks not.
held_s="${GALA_MPI_HELD_S:-900}"
# So many starts in a row that come no further are the last: the cause is not the clock.
most_idle_starts=3
# Between the warning and the limit; the templates' headers say the same to the scheduler.
warned_s=300

say() { echo "job: $*"; }

refuse() {
    echo "$*" >&2
    exit 2
}

# What Slurm says of this job, such as its JobState; nothing if it says nothing.
fact() {
    local said
    said=$(scontrol show job "${SLURM_JOB_ID:-}" 2> /dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1) || true
    case "$said" in "(null)" | None | N/A | Unknown) ;; *) printf '%s' "$said" ;; esac
}

# Sleep in a way that a signal's trap does not wait for.
pause() {
    sleep "$1" &
    wait "$!" || true
}

# Given what the job script was given, for the case that it is to be submitted again.
begin() {
    submitted=("$@")
    # shellcheck source=jobs/env.sh
    source "$here/env.sh"
    if [[ ! -e "$environment/bin/activate" ]]; then
        refuse "GALA_MPI_ENV: $environment is no virtual environment; set it to the one that gala-mpi is installed in"
    fi
    # shellcheck source=/dev/null
    source "$environment/bin/activate"
    case "$again" in requeue | resubmit | no) ;; *) refuse "GALA_MPI_AGAIN: $again; expected requeue, resubmit or no" ;; esac
    # Cores of a rank: libraries must not start threads of their own on top. From 22.05 on srun takes over no
    # --cpus-per-task from its job.
    cores="${SLURM_CPUS_PER_TASK:-${GALA_MPI_CORES:-1}}"
    export OMP_NUM_THREADS="$cores" SRUN_CPUS_PER_TASK="$cores"
    count_ranks
    choose_launcher
    banner
}

count_ranks() {
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        # With --ntasks-per-node alone, some versions of Slurm set no number of tasks.
        ranks="${SLURM_NTASKS:-$((${SLURM_NNODES:-0} * ${SLURM_NTASKS_PER_NODE:-0}))}"
        nodes="${SLURM_JOB_NODELIST:-}"
        [[ "$ranks" != 0 ]] || refuse "SLURM_NTASKS: is not set, nor SLURM_NNODES and SLURM_NTASKS_PER_NODE; add #SBATCH --ntasks=<ranks>"
    elif [[ -n "${PBS_NODEFILE:-}" ]]; then
        ranks=$(wc -l < "$PBS_NODEFILE")
        nodes=$(sort -u "$PBS_NODEFILE" | paste -sd, -)
    elif [[ -n "${LSB_DJOB_NUMPROC:-}" ]]; then
        ranks=$LSB_DJOB_NUMPROC
        nodes="${LSB_MCPU_HOSTS:-}"
    else
        refuse "this is no job of Slurm, PBS or LSF: submit it with sbatch, qsub or bsub"
    fi
    number="${SLURM_JOB_ID:-${PBS_JOBID:-${LSB_JOBID:-}}}"
}

choose_launcher() {
    local kind offered
    library=$(python -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 \n"))' 2> /dev/null) ||
        refuse "no MPI library can be loaded: load the module of your site's MPI in jobs/env.sh, or pip install mpich"
    case "$library" in
        *"Open MPI"*) kind=openmpi own=(mpirun --enable-recovery -n "$ranks") fitting=pmix ;;
        # Intel's mpirun is a script that passes no signal on.
        *Intel*) kind=intel own=(mpiexec.hydra -n "$ranks") fitting=pmi2 ;;
        *CRAY*) kind=cray own=(aprun -n "$ranks") fitting=cray_shasta ;;
        *MVAPICH*) kind=mvapich own=(mpirun -n "$ranks") fitting=pmi2 ;;
        *) kind=mpich own=(mpirun -disable-auto-cleanup -n "$ranks") fitting=pmi2 ;;
    esac
    [[ "$pmi" == auto ]] && pmi=$fitting
    if [[ "$how" == auto ]]; then
        how=mpirun
        offered=$([[ -n "${SLURM_JOB_ID:-}" ]] && srun --mpi=list 2>&1) || offered=""
        [[ "$offered" =~ (^|[[:space:]])"$pmi"([[:space:]]|$) ]] && how=srun
    fi
    around=() passed=USR1
    case "$how" in
        # Ranks that survive the death of another go on.
        srun) launcher=(srun --mpi="$pmi" --kill-on-bad-exit=0 --cpus-per-task="$cores") ;;
        mpirun)
            launcher=("${own[@]}")
            # Under it ranks pay no heed to SIGUSR1, by which MPICH tells of another's death.
            if [[ $kind == mpich ]]; then around=(sh "$here/outlive.sh") passed=TERM; fi
            ;;
        *) refuse "GALA_MPI_LAUNCHER: $how; expected srun, mpirun or auto" ;;
    esac
}

banner() {
    say "$(date '+%Y-%m-%d %H:%M:%S %Z'), ${SLURM_JOB_NAME:-${PBS_JOBNAME:-${LSB_JOBNAME:-gala-mpi}}} $number, restart ${SLURM_RESTART_COUNT:-0}"
    say "$ranks ranks of $cores core(s) on $nodes"
    say "$library, started by: ${launcher[*]}"
}

# Started by a step that lasts as long as the job: Slurm ends what a step leaves behind.
start_mps() {
    export CUDA_MPS_PIPE_DIRECTORY="/tmp/mps-$number" CUDA_MPS_LOG_DIRECTORY="/tmp/mps-$number/log"
    local each=(srun --mpi=none --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --overlap)
    if ! command -v nvidia-cuda-mps-control > /dev/null; then
        say "nvidia-cuda-mps-control: not found; ranks that share a GPU take turns on it"
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
        return
    fi
    # shellcheck disable=SC2016  # the step's own shell expands it
    "${each[@]}" bash -c 'mkdir -p "$CUDA_MPS_LOG_DIRECTORY" && exec nvidia-cuda-mps-control -f' &
    mps=$!
    # shellcheck disable=SC2064  # the number of now
    trap "kill $mps 2> /dev/null || true" EXIT
    # shellcheck disable=SC2016
    if "${each[@]}" bash -c 'for ((i = 0; i < 150; ++i)); do [[ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ]] && exit; sleep 0.2; done; exit 1'; then
        say "MPS runs on $nodes"
    else
        say "MPS did not start on all nodes within 30 s (its log: $CUDA_MPS_LOG_DIRECTORY); ranks that share a GPU take turns on it"
        kill "$mps" 2> /dev/null || true
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
}

on_ranks() {
    take_new_steps
    "${launcher[@]}" "${around[@]}" "$@"
}

# MPICH names a file in /dev/shm by job and step. A job that was queued again has the number that it had, so its step must
# be another: what killed ranks have left is in nobody's way then.
take_new_steps() {
    [[ "$how" == srun ]] || return 0
    for ((step = 0; step < ${SLURM_RESTART_COUNT:-0}; ++step)); do
        srun --mpi=none --nodes=1 --ntasks=1 --cpus-per-task=1 true || true
    done
}

# Exit code, last segment and steps of the run in $out, by its own record; nothing if there is none.
read_run() {
    declare -g run_code="" run_segment="" run_steps=0
    read -r run_code run_segment run_steps < <(gala-mpi status "$out" --only code segment steps 2> /dev/null) || true
}

train() {
    out=$1
    shift
    local given
    for given in "$@"; do
        if [[ "$given" == --out* || "$given" == --resume* ]]; then
            refuse "$given: set GALA_MPI_OUT to the run's folder instead; a job that is queued again resumes it by itself"
        fi
    done
    watch_the_limit
    # Told of the limit; told by Slurm that the job is cancelled or preempted.
    warned="" ended="" ranks_pid=""
    trap 'warned=1; pass_on' USR1
    trap 'ended=1; pass_on' TERM
    local code=6
    for ((waited = 0; ; waited += 30)); do
        read_run
        if [[ "$run_code" != 6 ]]; then
            one_start "$@"
            [[ "$code" == 6 ]] || break
        fi
        if [[ -n "$warned$ended" ]] || ((waited >= held_s)); then break; fi
        say "another job goes on with $out, or its ranks do: waiting for it"
        pause 30
    done
    finish "$code" "$@"
}

# Start the ranks, and wait for them; sets `code` to the run's exit code.
one_start() {
    local before=$run_segment launched=127 said where=(--out "$out")
    steps_before=$run_steps
    if [[ -e "$out/run.json" ]]; then where=(--resume "$out"); fi
    take_new_steps
    # The launcher itself: signals are for it.
    "${launcher[@]}" "${around[@]}" gala-mpi train "${where[@]}" "$@" &
    ranks_pid=$!
    # Told before there were ranks.
    if [[ -n "$warned$ended" ]]; then pass_on; fi
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
    if [[ -n "$run_segment" && "$run_segment" != "$before" ]]; then
        code=$run_code
    else
        # It never began: the line above says why. Unless it was told to end before it could.
        code=$launched
        [[ "$code" != 0 ]] || code=1
        if [[ -n "$warned$ended" && "$code" -gt 6 ]]; then code=75; fi
    fi
}

# Launchers pass signals on to the ranks. To a step of srun Slurm has sent its own SIGTERM already.
pass_on() {
    [[ -n "$ranks_pid" ]] || return 0
    if [[ -n "$warned" || "$how" != srun ]]; then kill -"$passed" "$ranks_pid" 2> /dev/null || true; fi
}

# End the job, if it goes on later; else the run's exit code.
finish() {
    local code=$1
    shift
    if [[ "$code" == 75 || "$code" == 6 ]] && may_go_again; then
        echo "$(date '+%Y-%m-%d %H:%M:%S') job $number: from ${steps_before:-0} to $run_steps steps" \
            2> /dev/null >> "$out/jobs.txt" || true
        if [[ "$code" == 75 ]] && idle; then
            say "the last $most_idle_starts starts came no further than ${run_steps} steps: not queued again; what they print above says why"
        else
            go_again "$@"
            exit "$code"
        fi
    fi
    say "$out: exit code $code"
    return "$code"
}

# Whether the last starts have all ended at the same steps, or before their first checkpoint.
idle() {
    local reached
    reached=$(tail -n "$most_idle_starts" "$out/jobs.txt" 2> /dev/null | awk '{ if ($(NF-3) == $(NF-1)) ++n } END { print n + 0 }')
    [[ "$reached" == "$most_idle_starts" ]]
}

# Whether the job was told of its limit, preempted, or waits for another; not if a user has cancelled it.
may_go_again() {
    local state
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        [[ -n "$warned" || "$code" == 6 ]]
        return
    fi
    state=$(fact JobState)
    # In its time of grace a job that is preempted still runs, and only its ranks have been told.
    if [[ "$state" == RUNNING && -n "$(fact PreemptTime)" ]]; then return 0; fi
    [[ -n "$warned" || "$code" == 6 ]] && [[ "$state" == RUNNING || "$(fact Reason)" == TimeLimit ]]
}

go_again() {
    # LSF queues a job again by its exit code (#BSUB -Q), PBS lets nobody queue his own.
    local way=$again
    if [[ -n "${PBS_JOBID:-}" && "$way" == requeue ]]; then way=resubmit; fi
    if [[ -n "${LSB_JOBID:-}" && "$way" == requeue ]]; then
        say "goes on later: LSF queues it again for its exit code (#BSUB -Q)"
        return
    fi
    case "$way" in
        requeue)
            say "goes on later: into the queue again. Slurm calls that CANCELLED ... DUE TO JOB REQUEUE"
            scontrol requeue "$SLURM_JOB_ID" && exit 75
            say "this site does not let a job queue itself again: set GALA_MPI_AGAIN=resubmit"
            ;;
        resubmit)
            say "goes on later: submitted again"
            resubmit "$@" && return 0
            say "could not be submitted again; go on with it: GALA_MPI_OUT=$out sbatch ..."
            ;;
        no) say "go on with it: submit it again with GALA_MPI_OUT=$out" ;;
    esac
}

resubmit() {
    local options=() name value
    # An array has a folder for all of its members.
    export GALA_MPI_OUT="${folder:-$out}"
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        # What was given to sbatch in place of the script's own header.
        for name in Account Partition QOS TimeLimit:time NumNodes:nodes NumTasks:ntasks CPUs/Task:cpus-per-task; do
            value=$(fact "${name%%:*}")
            name=${name##*:}
            [[ -z "$value" ]] || options+=("--${name,,}=${value%%-*}")
        done
        if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then options+=(--array="$SLURM_ARRAY_TASK_ID"); fi
        sbatch "${options[@]}" --job-name="$SLURM_JOB_NAME" --dependency="afterany:$SLURM_JOB_ID" "$(fact Command)" \
            "${submitted[@]}"
    elif [[ -n "${PBS_JOBID:-}" ]]; then
        qsub -V -W depend=afterany:"$PBS_JOBID" "$here/train.pbs"
    else
        return 1
    fi
}

# Refuse a time limit that leaves no time to train. PBS gives no warning: this job is to give it to itself.
watch_the_limit() {
    local limit days=0 limit_s
    if [[ -n "${PBS_JOBID:-}" ]]; then
        limit=$(qstat -f "$PBS_JOBID" 2> /dev/null | sed -n 's/^ *Resource_List.walltime = //p') || true
    else
        limit=$(fact TimeLimit)
    fi
    [[ "$limit" =~ ^([0-9]+-)?([0-9]+):([0-9]+):([0-9]+)$ ]] || return 0
    days=${BASH_REMATCH[1]%-}
    limit_s=$((10#${days:-0} * 86400 + 10#${BASH_REMATCH[2]} * 3600 + 10#${BASH_REMATCH[3]} * 60 + 10#${BASH_REMATCH[4]}))
    if ((limit_s < 2 * warned_s)); then
        refuse "time limit: $limit cannot be used; expected at least $((2 * warned_s / 60)) minutes: the job is told" \
            "$warned_s s before its limit, and is to train before that"
    fi
    if [[ -n "${PBS_JOBID:-}" && -z "${timer:-}" ]]; then
        { sleep $((limit_s - warned_s)) && kill -USR1 $$; } &
        timer=$!
        # shellcheck disable=SC2064  # the number of now
        trap "kill $timer 2> /dev/null || true" EXIT
    fi
}
