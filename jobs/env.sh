# shellcheck shell=bash disable=SC2034  # job.sh reads it all
# What your site needs, in one place: every job script in this folder reads it. Change what is marked <...>. What has a
# variable can be set at submission as well:
#
#   GALA_MPI_ENV=/path/to/.venv sbatch jobs/train.sbatch

# <Modules: the MPI that mpi4py was built with. None, if the environment brings an MPI of its own.>
# module purge
# module load openmpi/5.0

# <The virtual environment that gala-mpi is installed in.>
environment="${GALA_MPI_ENV:-$HOME/gala-mpi/.venv}"

# <The folder of all runs: on a file system that all nodes see, and that has room.>
runs="${GALA_MPI_RUNS:-runs}"

# How ranks are started: srun, or mpirun for the MPI library's own launcher.
# auto: srun under Slurm, if it has the PMI of the MPI library, else mpirun.
how="${GALA_MPI_LAUNCHER:-auto}"

# Under srun: the PMI of the MPI library, of those that `srun --mpi=list` shows.
# auto: pmix for Open MPI, pmi2 for MPICH, Intel MPI and MVAPICH, cray_shasta for Cray's MPICH.
pmi="${GALA_MPI_PMI:-auto}"

# Before its time limit a job is told, checkpoints its run, and goes on later. How:
#   requeue   it puts itself into the queue again, under its own number (Slurm)
#   resubmit  it submits itself again: for sites that forbid the other, and for PBS
#   no        it ends with exit code 75; submit it again with GALA_MPI_OUT set to the run's folder
again="${GALA_MPI_AGAIN:-requeue}"

# <What your MPI library, your fabric or your GPUs need.>
# export MPIR_CVAR_CH4_NETMOD=ofi
