# shellcheck shell=bash disable=SC2034  # job.sh reads it all
# What your site needs, in one place: every job script in this folder reads it. Change what is marked <...>. What has a
# variable can be set at submission as well:
#
#   GALA_MPI_ENV=/path/to/.venv sbatch jobs/train.sbatch

# <Modules: the MPI that mpi4py was built with. None, if the environment brings an MPI of its own.>
# module purge
# module load openmpi/5.0

# <The virtual environment that gala-mpi is installed in. Empty, if it is there already: by a module or conda, say.>
environment="${GALA_MPI_ENV-$HOME/gala-mpi/.venv}"

# <The folder of all runs: on a file system that all nodes see, and that has room.>
runs="${GALA_MPI_RUNS:-runs}"

# How ranks are started: srun, or mpirun for the MPI library's own launcher.
# auto: srun under Slurm, if it has the PMI of the MPI library and lets ranks go on that survive another; else mpirun.
how="${GALA_MPI_LAUNCHER:-auto}"

# Under srun: the PMI of the MPI library, of those that `srun --mpi=list` shows.
# auto: pmix for Open MPI, pmi2 for MPICH, Intel MPI and MVAPICH, cray_shasta for Cray's MPICH.
pmi="${GALA_MPI_PMI:-auto}"

# Cores of a rank, where the scheduler does not say.
cores="${GALA_MPI_CORES:-1}"

# Before its time limit a job is told, checkpoints its run, and goes on later. How:
#   auto      Slurm and LSF put it into the queue again; under PBS it submits itself again
#   resubmit  it submits itself again, under Slurm too: for sites that let no job be queued again
#   no        it ends with exit code 75; submit it again with GALA_MPI_OUT set to the run's folder
again="${GALA_MPI_AGAIN:-auto}"

# So many seconds before the limit; the headers say the same (--signal=B:USR1@300, -wt 5). The ranks may need 240 of them
# to find out that one is dead.
warned_s=300

# Seconds that a job waits for another that goes on with its run.
held_s="${GALA_MPI_HELD_S:-900}"

# <What your MPI library, your fabric or your GPUs need.>
# export MPIR_CVAR_CH4_NETMOD=ofi
