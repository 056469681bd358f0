"""What the exit code of `gala-mpi` says."""

from __future__ import annotations

EXIT_OK = 0  # the budget or the time limit is reached; the doctor has found nothing that fails
EXIT_ERROR = 1  # an error, with its traceback; the doctor has found what fails
EXIT_CONFIG = 2  # a setting that cannot be used; nothing was written
EXIT_LOST = 3  # as 0, but ranks were lost on the way
EXIT_DIVERGED = 4  # as 0, but ranks ended as their parameters were not finite
EXIT_UNWRITTEN = 5  # as 0 or 75, but not all could be written
EXIT_HELD = 6  # the run still goes on, by another start; nothing was written
EXIT_STOPPED = 75  # stopped by a signal, or as another start goes on with the run: --resume goes on
