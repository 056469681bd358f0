"""`python -m gala_mpi` is `gala-mpi`."""

from gala_mpi.cli import main

main()
