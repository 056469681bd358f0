#include "learn.h"

#include <math.h>

#include "multiversion.h"

/* Pixels are interleaved a block at a time as bytes, then scaled as one run: both loops become vector code. */
enum { BLOCK = 64 };

INLINE void interleave(size_t planes, size_t pixels, size_t length, const uint8_t *restrict in, uint8_t *restrict out)
{
    for (size_t p = 0; p < length; p++)
        for (size_t c = 0; c < planes; c++)
            out[planes * p + c] = in[c * pixels + p];
}

INLINE void scale(size_t count, const uint8_t *restrict in, float *restrict out)
{
    for (size_t i = 0; i < count; i++)
        out[i] = (float)in[i] / 255.0f;
}

INLINE void scale_bfloat16(size_t count, const uint8_t *restrict in, uint16_t *restrict out)
{
    for (size_t i = 0; i < count; i++) {
        union { float value; uint32_t bits; } x = {.value = (float)in[i] / 255.0f};
        /* To nearest, ties to even; no value is near the largest, or not a number. */
        out[i] = (uint16_t)((x.bits + 0x7fffu + ((x.bits >> 16) & 1u)) >> 16);
    }
}

/* Four planes, the usual number, are known when it is compiled; others may be many: a pixel at a time. */
#define SCALE_FRAMES(NAME, TYPE, SCALE)                                                                                \
    MULTIVERSION void NAME(size_t frames, size_t planes, size_t pixels, const uint8_t *restrict in,                    \
                           TYPE *restrict out)                                                                         \
    {                                                                                                                  \
        uint8_t mixed[4 * BLOCK];                                                                                      \
        for (size_t f = 0; f < frames; f++, in += planes * pixels, out += planes * pixels) {                           \
            size_t p = 0;                                                                                              \
            for (; planes == 4 && p < pixels; p += BLOCK) {                                                            \
                size_t length = pixels - p < BLOCK ? pixels - p : BLOCK;                                               \
                interleave(4, pixels, length, in + p, mixed);                                                          \
                SCALE(4 * length, mixed, out + 4 * p);                                                                 \
            }                                                                                                          \
            for (; p < pixels; p++)                                                                                    \
                for (size_t c = 0; c < planes; c++)                                                                    \
                    SCALE(1, in + c * pixels + p, out + p * planes + c);                                               \
        }                                                                                                              \
    }

SCALE_FRAMES(scale_frames, float, scale)
SCALE_FRAMES(scale_frames_bfloat16, uint16_t, scale_bfloat16)

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
