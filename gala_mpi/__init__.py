"""Actor-learners that average their policies by asynchronous gossip over one-sided MPI.

Importing this package initialises no MPI, seeds nothing and starts no thread.
"""

__version__ = "0.1.0"
