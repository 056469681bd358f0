/* The checksum of a message, and a copy that is checked as it is made. Knows nothing of Python. */
#ifndef GALA_MPI_CHECKSUM_H
#define GALA_MPI_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Of `nbytes` bytes at any address, in the machine's byte order. */
uint64_t checksum(size_t nbytes, const unsigned char *memory, uint64_t seed);

/* to <- from, and the checksum of what `to` then holds, though others may write to `from` meanwhile. */
uint64_t checked_copy(size_t nbytes, const unsigned char *from, unsigned char *to, uint64_t seed);

#endif
