#!/bin/sh
# cluster_agent.sh [ssh options] HOST COMMAND...
#
# Stands in for ssh where a host is a network namespace (tests/cluster.py): runs COMMAND, by a shell as ssh does,
# with HOST's network, HOST's name, and a core and a shared memory of HOST's own. GALA_MPI_CLUSTER is what the names of the
# cluster's namespaces begin with, GALA_MPI_CLUSTER_NAMES what /etc/hosts shall say, with commas between the lines.
set -eu
while :; do
    case $1 in
        -[bceiloFJLmpQRSW]) shift 2 ;;  # options of ssh with a value
        -*) shift ;;
        *) break ;;
    esac
done
host=$1
shift
# A core of its own, as far as there are enough: ranks that share one are to know it.
cpu=$((${host##*[!0-9]} % $(nproc)))
# `ip netns exec` gives each call mounts of its own, so what is mounted here is seen by nothing else.
# Without a hostname of its own, MPI would take all hosts for one node.
# shellcheck disable=SC2016
exec taskset -c "$cpu" ip netns exec "$GALA_MPI_CLUSTER-$host" unshare --uts sh -c '
    hostname "$1" &&
    mount -t tmpfs none /dev/shm &&
    echo "$GALA_MPI_CLUSTER_NAMES" | tr , "\n" > /dev/shm/hosts &&
    mount --bind /dev/shm/hosts /etc/hosts &&
    rm /dev/shm/hosts &&
    exec sh -c "$2"' sh "$host" "$*"
