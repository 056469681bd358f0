"""What a run leaves on disk: its folder and lease, checkpoints, metrics, and what a resumed run goes on from.

Imports `mpi` and the ground; imported by `train`. Entry point: `run_folder.create_run`.
"""
