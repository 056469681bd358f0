#!/bin/sh
# Let the survivors of a killed rank go on under MPICH's mpirun:
#
#   mpirun -disable-auto-cleanup -n 32 sh jobs/outlive.sh gala-mpi train
#
# MPICH's process manager ends all ranks, in spite of -disable-auto-cleanup, if it notices a rank's death before
# the end of that rank's connection to it. A parent that outlives the rank by a second lets it notice the
# connection first. srun and Open MPI's mpirun need no such thing.
trap '' USR1       # the process manager tells survivors of a death by it
trap : TERM INT HUP    # for the rank to act on
"$@"
code=$?
[ "$code" -lt 128 ] || sleep 1
exit "$code"
