/* Kernels of the learner: what goes into the network, and the optimiser's step. No output overlaps an input. */
#ifndef GALA_MPI_LEARN_H
#define GALA_MPI_LEARN_H

#include <stddef.h>
#include <stdint.h>

/* out[f][p][c] = in[f][c][p] / 255: `frames` images of `planes` planes of `pixels` values each, to pixels with their
 * planes side by side (channels last). The second one gives the bits of bfloat16, rounded to nearest. */
void scale_frames(size_t frames, size_t planes, size_t pixels, const uint8_t *restrict in, float *restrict out);
void scale_frames_bfloat16(size_t frames, size_t planes, size_t pixels, const uint8_t *restrict in,
                           uint16_t *restrict out);

/* One step of RMSprop on the gradient times `scale`, in one pass:
 * square <- alpha * square + (1 - alpha) * g * g, then data <- data - learning_rate * g / (sqrt(square) + epsilon). */
void rmsprop(size_t count, float *restrict data, const float *restrict grad, float *restrict square, float scale,
             float learning_rate, double alpha, float epsilon);

#endif
