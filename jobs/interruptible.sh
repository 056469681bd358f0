#!/usr/bin/env bash
# Let Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal end a run in order, with checkpoints, under every launcher:
#
#   bash jobs/interruptible.sh mpirun -n 32 gala-mpi train --env ALE/Pong-v5
#
# Open MPI's mpirun, when it is told to end, kills the ranks a quarter of a second later; MPICH's ends at once when its
# terminal is closed, and the ranks with it. SIGUSR1 both pass on, and go on themselves: that is what they get here. Another
# signal, over a second later, ends the launcher at once.
#
# What the launcher prints passes through this script: launchers end a job whose output cannot be written, since a disk is
# full, or whose reader has left.
set -uo pipefail
# A process group of its own for the launcher, and for what passes its output on: the terminal's Ctrl-C comes to this
# script alone.
set -m
launcher="" told=""

# Pass on what comes for as long as it comes, whether or not somebody takes it; what is no whole line after a while too.
pass_on() {
    local LC_ALL=C piece code=0
    trap '' PIPE
    while ((code == 0 || code > 128)); do
        IFS= read -r -N 4096 -t 0.2 piece
        code=$?
        printf '%s' "$piece" || :
    done
} 2> /dev/null

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

# Descriptors that are closed would be given to the pipes below.
[[ -e /proc/self/fd/1 ]] || exec > /dev/null
[[ -e /proc/self/fd/2 ]] || exec 2> /dev/null
exec 3> >(pass_on) && outputs=("$!")
exec 4> >(exec 5>&2 3>&- && pass_on >&5) && outputs+=("$!")
"$@" < /dev/null >&3 2>&4 3>&- 4>&- &
launcher=$!
exec 3>&- 4>&-
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
# What it has said comes first; but who still holds its output open is not waited for.
for ((tries = 0; tries < 50; ++tries)); do
    kill -0 "${outputs[@]}" 2> /dev/null || break
    sleep 0.1
done
exit "$code"
