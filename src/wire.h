/* Kernels over what a message holds: values of a wire type, as bytes at any address. They know nothing of Python and
 * allocate nothing. No output overlaps an input. */
#ifndef GALA_MPI_WIRE_H
#define GALA_MPI_WIRE_H

#include <stddef.h>
#include <stdint.h>

enum wire { WIRE_FLOAT32, WIRE_BFLOAT16, WIRE_FLOAT16, WIRE_COUNT };

extern const size_t wire_itemsize[WIRE_COUNT];
extern const char *const wire_names[WIRE_COUNT];

/* out[i] = values[i] in the wire type, rounded to nearest even. `values` may lie at any address. */
void pack(enum wire wire, size_t count, const void *restrict values, unsigned char *restrict out);

/* Whether every value is finite. */
int all_finite(enum wire wire, size_t count, const unsigned char *restrict message);

#endif
