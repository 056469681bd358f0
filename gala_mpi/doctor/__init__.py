"""What `gala-mpi doctor` examines, and what training looks at before it starts."""
