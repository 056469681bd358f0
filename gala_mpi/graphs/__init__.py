"""What `gala-mpi topology` tells of a topology: measures and drawings."""
