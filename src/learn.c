#include "learn.h"

#include <math.h>

#include "multiversion.h"

/* Pixels are interleaved a block at a time as bytes, then scaled as one run: both loops become vector code. */
enum { BLOCK = 64 };

INLINE void scale_block_of_4(size_t pixels, size_t length, const uint8_t *restrict in, float *restrict out)
{
    uint8_t mixed[4 * BLOCK];
    for (size_t p = 0; p < length; p++)
        for (size_t c = 0; c < 4; c++)
            mixed[4 * p + c] = in[c * pixels + p];
    for (size_t i = 0; i < 4 * length; i++)
        out[i] = (float)mixed[i] / 255.0f;
}

MULTIVERSION static void scale_frames_of_4(size_t frames, size_t pixels, const uint8_t *restrict in,
                                           float *restrict out)
{
    for (size_t f = 0; f < frames; f++, in += 4 * pixels, out += 4 * pixels) {
        size_t p = 0;
        for (; p + BLOCK <= pixels; p += BLOCK)
            scale_block_of_4(pixels, BLOCK, in + p, out + 4 * p);
        scale_block_of_4(pixels, pixels - p, in + p, out + 4 * p);
    }
}

void scale_frames(size_t frames, size_t planes, size_t pixels, const uint8_t *restrict in, float *restrict out)
{
    if (planes == 4) {
        scale_frames_of_4(frames, pixels, in, out);
        return;
    }
    for (size_t f = 0; f < frames; f++, in += planes * pixels, out += planes * pixels)
        for (size_t p = 0; p < pixels; p++)
            for (size_t c = 0; c < planes; c++)
                out[p * planes + c] = (float)in[c * pixels + p] / 255.0f;
}

MULTIVERSION void rmsprop(size_t count, float *restrict data, const float *restrict grad, float *restrict square,
                          float scale, float learning_rate, double alpha, float epsilon)
{
    float keep = (float)alpha, rest = (float)(1.0 - alpha);
    for (size_t i = 0; i < count; i++) {
        float g = grad[i] * scale;
        float s = keep * square[i] + rest * g * g;
        square[i] = s;
        data[i] -= learning_rate * g / (sqrtf(s) + epsilon);
    }
}
