"""The command `gala-mpi bench`: what an exchange costs on this transport.

Imports `doctor` and the packages below; imported by `cli` alone. Entry point: `command.run`.
"""
