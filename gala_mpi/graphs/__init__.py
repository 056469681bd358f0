"""The command `gala-mpi topology`: measures and drawings of graphs. No MPI.

Imports `gossip.topology` and the ground; imported by `cli` alone. Entry point: `command.report`.
"""
