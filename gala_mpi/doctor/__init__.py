"""The command `gala-mpi doctor`, and the checks that every run begins with (`preflight`).

Imports `gossip`, `mpi` and the ground; imported by `train`, `bench` and `cli`. Entry point: `command.run`.
"""
