#!/usr/bin/env bash
# Let Ctrl-C, SIGTERM or SIGUSR1 end a run in order, with checkpoints, under every launcher:
#
#   bash jobs/interruptible.sh mpirun -n 32 gala-mpi train --env ALE/Pong-v5
#
# Open MPI's mpirun, when it is told to end, kills the ranks a quarter of a second later. SIGUSR1 it passes on, and goes
# on itself: that is what it gets here, also when the terminal is closed. Another signal, over a second later, ends the
# launcher at once.
set -uo pipefail
# A process group of its own for the launcher: the terminal's Ctrl-C comes to this script alone.
set -m
launcher="" told=""

# shellcheck disable=SC2329  # it is called by the traps
tell() {
    # In microseconds; the locale chooses the separator.
    local now=${EPOCHREALTIME/[.,]/}
    if [[ -z "$told" ]]; then
        told=$now
        [[ -z "$launcher" ]] || kill -USR1 "$launcher" 2> /dev/null
    elif ((now - told > 1000000)); then
        kill -TERM "$launcher" 2> /dev/null
    fi
}
trap tell INT TERM USR1 HUP

"$@" < /dev/null &
launcher=$!
# Told before there was a launcher: it has run nothing yet.
[[ -z "$told" ]] || kill -TERM "$launcher" 2> /dev/null
# A signal ends a wait, but not the launcher.
while
    wait "$launcher"
    code=$?
    [[ "$code" -gt 128 ]] && kill -0 "$launcher" 2> /dev/null
do :; done
# It may have ended between the two; 127: the first has told its code.
wait "$launcher" && ended=0 || ended=$?
[[ "$ended" == 127 ]] || code=$ended
exit "$code"
