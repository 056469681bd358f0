"""What `gala-mpi bench` measures: the cost of an exchange, beside memory and all-reduces."""
