#!/usr/bin/env bash
# A Slurm of two nodes on one machine, to try job scripts on: munged, slurmctld and two slurmds, in this host alone.
#
#   sudo bash tests/slurm.sh start      # installs what is missing, writes the configuration, starts the daemons
#   export SLURM_CONF=/tmp/slurm-one-machine/slurm.conf     # then sbatch, srun, squeue, scancel, scontrol as usual
#   sudo bash tests/slurm.sh status    # what runs
#   sudo bash tests/slurm.sh stop      # cancels all jobs, and ends the daemons that it started, by process id
#   sudo bash tests/slurm.sh clean     # the same, and removes $BASE: job numbers begin at 1 again
#   sudo bash tests/slurm.sh kill-node n2     # SIGKILL to one slurmd: its jobs' processes live on
#   sudo bash tests/slurm.sh start-node n2    # and back
#
# 'start' may be given again and again; begin it with "nice -n 10" and all jobs are nice. Tried as root on Debian 12 (Slurm
# 22.05.8, munge 0.5.15), in a container without systemd. All of it lies in $BASE.
# Settings, by environment variables at 'start':
#
#   BASE          /tmp/slurm-one-machine     configuration, state, logs, spool; one Slurm each
#   PORT          17000   and the two after it: of the daemons
#   CPUS          16      cores that each node claims to have, whatever the machine has (config_overrides below)
#   MEMORY_MB     40000   memory that each node claims: 16 tasks of 2 GB fit
#   TASK_PLUGIN   task/none     task/affinity binds tasks to cores, task/affinity,task/cgroup also limits memory (tried with
#                 cgroup v1 alone): for both CPUS must be the number of the machine's cores, which both nodes then share
#   REQUEUE_S     120     a job that is requeued begins no earlier than this after (Slurm's default)
#   TIMEOUT_S     30      a node whose slurmd is silent for this long is DOWN (Slurm's default is 300)
#   KILL_WAIT_S   30      between SIGTERM and SIGKILL (Slurm's default)
#
# Give 'clean' before a start with other settings. What differs from a cluster:
#
#   - Both nodes have one host name, so an MPI sees one node, and uses shared memory. MPICH: export MPIR_CVAR_NOLOCAL=1
#     for its network. Two nodes that are bound to cores are bound to the same ones.
#   - srun --mpi=pmi2 (MPICH) works on both nodes, --mpi=pmix (Open MPI) within one: Slurm's plugin makes a folder in /tmp
#     by job and step alone. hydra's mpirun works on both.
#   - A time limit, and the signal before it (--signal), come up to 60 s early or late: limits are whole minutes.
#   - Preemption: sbatch -p urgent pushes jobs of the partition normal out, after SIGTERM and a grace of 20 s.
set -euo pipefail

BASE="${BASE:-/tmp/slurm-one-machine}"
CPUS="${CPUS:-16}"
MEMORY_MB="${MEMORY_MB:-40000}"
TASK_PLUGIN="${TASK_PLUGIN:-task/none}"
REQUEUE_S="${REQUEUE_S:-120}"
TIMEOUT_S="${TIMEOUT_S:-30}"
KILL_WAIT_S="${KILL_WAIT_S:-30}"
NODES=(n1 n2)
PORT="${PORT:-17000}"
export SLURM_CONF="$BASE/slurm.conf"

[[ "$(id -u)" == 0 ]] || { echo "to be run as root" >&2; exit 2; }

install_what_is_missing() {
    if ! command -v slurmctld munged > /dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        # Several may want it at once.
        (
            flock 9
            command -v slurmctld munged > /dev/null || {
                apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge
            }
        ) 9> /tmp/slurm-one-machine.lock > "$BASE/apt.log" 2>&1 || { tail -5 "$BASE/apt.log" >&2; exit 1; }
    fi
}

# Whether the process of a pid file lives, and is that program (process numbers come again).
lives() {
    local file=$1 program=$2 pid
    # A zombie, which a container's first process may never take away, is none that lives.
    [[ -s "$file" ]] && pid=$(< "$file") && [[ "$(cat "/proc/$pid/comm" 2> /dev/null)" == "$program" ]] &&
        ! grep -q '^State:.Z' "/proc/$pid/status" 2> /dev/null
}

wait_for() {
    local what=$1 tries=150
    shift
    until "$@" > /dev/null 2>&1; do
        ((--tries)) || { echo "$what has not come up within 30 s; see $BASE/log" >&2; exit 1; }
        sleep 0.2
    done
}

start_munge() {
    local munge="$BASE/munge"
    if lives "$munge/munged.pid" munged; then return; fi
    install -d -m 755 -o munge -g munge "$munge"
    head -c 128 /dev/urandom > "$munge/key"
    chown munge:munge "$munge/key"
    chmod 400 "$munge/key"
    setpriv --reuid munge --regid munge --clear-groups munged --key-file="$munge/key" --socket="$munge/socket" \
        --pid-file="$munge/munged.pid" --log-file="$munge/munged.log" --seed-file="$munge/munged.seed"
    wait_for munged munge -n --socket="$munge/socket"
}

write_configuration() {
    cat > "$SLURM_CONF" << CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
# MPICH names files in /dev/shm by job and step: those of another Slurm on this machine are not to be the same.
FirstJobId=$(((PORT - 17000) * 1000 + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued may begin when the credentials of its last start have expired.
AuthInfo=cred_expire=$REQUEUE_S,socket=$BASE/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool-%n
SlurmctldPidFile=$BASE/slurmctld.pid
SlurmdPidFile=$BASE/slurmd-%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info

# Neither cgroups nor binding: a container has no right to them, and both nodes are the same machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=$TASK_PLUGIN
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
# srun gives no PMI unless it is asked for (--mpi=pmi2).
MpiDefault=none

SchedulerType=sched/backfill
# By default a pending job may wait for half a minute though there is room.
SchedulerParameters=bf_interval=5,sched_interval=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Jobs of a partition with a higher tier push others out, which go back into the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1

ReturnToService=2
SlurmdTimeout=$TIMEOUT_S
KillWait=$KILL_WAIT_S
InactiveLimit=0
Waittime=0
# The nodes claim what the configuration says, rather than what the machine has.
SlurmdParameters=config_overrides
CONF
    # Read where there is a cgroup plugin only.
    cat > "$BASE/cgroup.conf" << CONF
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=yes
ConstrainRAMSpace=yes
CONF
    local port=$((PORT + 1)) node
    for node in "${NODES[@]}"; do
        echo "NodeName=$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$port CPUs=$CPUS Sockets=1" \
            "CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY_MB State=UNKNOWN" >> "$SLURM_CONF"
        ((++port))
    done
    cat >> "$SLURM_CONF" << CONF
PartitionName=normal Nodes=n[1-2] Default=YES MaxTime=1-0 DefaultTime=10 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=1-0 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

start_node() {
    local node=$1
    if ! lives "$BASE/slurmd-$node.pid" slurmd; then
        mkdir -p "$BASE/spool-$node"
        slurmd -N "$node" -f "$SLURM_CONF"
    fi
}

stop_one() {
    local file=$1 program=$2 signal=${3:-TERM} pid
    if lives "$file" "$program"; then
        pid=$(< "$file")
        kill -"$signal" "$pid"
        for _ in {1..50}; do
            lives "$file" "$program" || break
            sleep 0.2
        done
    fi
    rm -f "$file"
}

stop_all() {
    # What still runs is ended first: a slurmd that goes leaves its jobs' processes behind.
    if lives "$BASE/slurmctld.pid" slurmctld; then
        scancel --state=PENDING > /dev/null 2>&1 || true
        scancel --state=RUNNING > /dev/null 2>&1 || true
        for ((tries = 0; tries < 2 * (KILL_WAIT_S + 10); ++tries)); do
            [[ -n "$(squeue -h 2> /dev/null)" ]] || break
            sleep 0.5
        done
    fi
    local node
    for node in "${NODES[@]}"; do stop_one "$BASE/slurmd-$node.pid" slurmd; done
    stop_one "$BASE/slurmctld.pid" slurmctld
    stop_one "$BASE/munge/munged.pid" munged
}

case "${1:-}" in
    start)
        mkdir -p "$BASE"/{state,log}
        install_what_is_missing
        start_munge
        write_configuration
        if lives "$BASE/slurmctld.pid" slurmctld; then
            scontrol reconfigure
        else
            slurmctld -f "$SLURM_CONF"
        fi
        wait_for slurmctld scontrol ping
        for node in "${NODES[@]}"; do start_node "$node"; done
        # Both free, or at work.
        # shellcheck disable=SC2016
        wait_for "the nodes" bash -c '[[ "$(sinfo -h -N -p normal -o %t | grep -cE "^(idle|mix|alloc)$")" == 2 ]]'
        sinfo -N -l
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    stop) stop_all ;;
    clean)
        stop_all
        rm -rf "$BASE"
        ;;
    status)
        for node in "${NODES[@]}"; do
            lives "$BASE/slurmd-$node.pid" slurmd && echo "slurmd $node: $(< "$BASE/slurmd-$node.pid")" || echo "slurmd $node: down"
        done
        lives "$BASE/slurmctld.pid" slurmctld && echo "slurmctld: $(< "$BASE/slurmctld.pid")" || echo "slurmctld: down"
        sinfo -N -l
        squeue
        ;;
    start-node) start_node "${2:?which node}" ;;
    # As when a node's daemon dies: its jobs' processes live on, and it cannot be asked to end them.
    kill-node) stop_one "$BASE/slurmd-${2:?which node}.pid" slurmd KILL ;;
    *)
        sed -n '2,11p' "$0" >&2
        exit 2
        ;;
esac
