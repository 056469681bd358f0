/* Kernels over flat float32 parameters. They know nothing of Python and allocate nothing.
 *
 * Buffers of a wire type are bytes at any address; float32 state is aligned as C wants it. No output overlaps
 * an input. The order of every sum is fixed, so results are the same on every instruction set.
 */
#ifndef GALA_MPI_MIX_H
#define GALA_MPI_MIX_H

#include <stddef.h>
#include <stdint.h>

#include "wire.h"

/* state <- self_weight * state + sum over k of weights[k] * messages[k], in this order, over the messages with
 * accepted[k]; squared[k] <- squared norm of state (before) - messages[k], or NaN if not accepted. Relative error of
 * a squared norm: at most 7e-7, also where the square of a difference overflows or underflows a float32. */
void mix(enum wire wire, size_t count, float *restrict state, float self_weight, size_t messages,
         const unsigned char *const *restrict message, const float *restrict weights,
         const int *restrict accepted, double *restrict squared);

/* One pass over the state that sends and mixes: each of `copies` buffers (one at least) <- state in float32, then `mix`
 * with float32 messages. Returns 0 if state has a value that is not finite; copies and state then hold neither the old
 * values nor the new. A message with a value that is not finite is left out, as if it had not been accepted: its
 * accepted[k] becomes 0, and its weight is added to self_weight. */
int exchange(size_t count, float *restrict state, size_t copies, unsigned char *const *restrict copy,
             double self_weight, size_t messages, const unsigned char *const *restrict message,
             const float *restrict weights, int *restrict accepted, double *restrict squared);

/* state <- 0.5 * state + 0.5 * message, and nothing else, as the yardstick of memory speed: two reads and a write
 * for each value. */
void average(size_t count, float *restrict state, const unsigned char *restrict message);

/* sketch[h(i)] <- sum of s(i) * state[i]; returns the squared norm of state. `buckets` is a power of two.
 *
 * With z = splitmix64's finaliser of seed + (i + 1) * 0x9E3779B97F4A7C15: h(i) = z mod buckets, and s(i) is -1
 * where bit 63 of z is set, else +1 (count sketch: Charikar, Chen and Farach-Colton, 2002). */
double sketch(size_t count, const float *restrict state, uint64_t seed, size_t buckets, double *restrict sums);

#endif
