"""The command `gala-mpi status`: whether runs go on, or how they have ended, by what they wrote. No MPI.

Imports `storage` and the ground; imported by `cli` alone. Entry point: `command.report`.
"""
