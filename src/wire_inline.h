/* The wire formats, a value at a time: each kernel compiles them as part of itself. */
#ifndef GALA_MPI_WIRE_INLINE_H
#define GALA_MPI_WIRE_INLINE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "multiversion.h"

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bfloat16 is the upper half of a float32. Adding 0x7FFF and the lowest bit kept rounds to nearest even; a NaN
 * keeps its upper half and becomes quiet, as the addition could turn it into an infinity. */
static inline uint16_t to_bfloat16(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

static inline float from_bfloat16(uint16_t half)
{
    return float_of((uint32_t)half << 16);
}

/* Three ranges: too large (infinity or NaN), too small for a normal half (an addition of 0.5 lets the processor
 * round the mantissa into place), and in between (exponent moved, mantissa rounded to nearest even). All three
 * are computed and one is picked, so that the loop has no branch. */
static inline uint16_t to_float16(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t large = magnitude > 0x7F800000u ? 0x7E00u | ((magnitude >> 13) & 0x1FFu) : 0x7C00u;
    uint32_t small = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3F000000u;
    uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
    return (uint16_t)(sign | half);
}

/* A half's exponent and mantissa, moved into a float32's place, are the value times 2^-112; a product puts the
 * scale right, denormals too. Infinity and NaN get the largest exponent. */
static inline float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(half & 0x7FFFu) << 13;
    uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | ((half & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : scaled));
}

INLINE float float_at(const unsigned char *restrict values, size_t i)
{
    float value;
    memcpy(&value, values + 4 * i, sizeof value);
    return value;
}

/* A value is finite unless all bits of its exponent are set: adding one at the exponent's lowest bit then
 * carries into the sign's place, where the bits of all values are gathered. */
INLINE int finite_32(size_t count, const unsigned char *restrict message)
{
    uint32_t gathered = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, message + 4 * i, sizeof bits);
        gathered |= (bits & 0x7F800000u) + 0x00800000u;
    }
    return !(gathered & 0x80000000u);
}

#endif
