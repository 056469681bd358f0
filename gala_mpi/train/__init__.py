"""The command `gala-mpi train`: a run from its arguments to its exit code.

Imports all packages below; imported by `cli` alone. Entry point: `command.run`; the loop is `agent.Agent.train`.
"""
