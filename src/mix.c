#include "mix.h"

#include <math.h>
#include <string.h>

#ifdef HAS_TARGET_CLONES
#define MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSION
#endif

/* A block of every operand stays in the first-level cache while it is used twice. */
enum { BLOCK = 1024, LANES = 16 };

const size_t wire_itemsize[WIRE_COUNT] = {4, 2, 2};

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

MULTIVERSION static void pack_bfloat16(size_t count, const unsigned char *restrict values, unsigned char *restrict out)
{
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, values + 4 * i, sizeof value);
        uint16_t half = to_bfloat16(value);
        memcpy(out + 2 * i, &half, sizeof half);
    }
}

MULTIVERSION static void pack_float16(size_t count, const unsigned char *restrict values, unsigned char *restrict out)
{
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, values + 4 * i, sizeof value);
        uint16_t half = to_float16(value);
        memcpy(out + 2 * i, &half, sizeof half);
    }
}

void pack(enum wire wire, size_t count, const void *restrict values, unsigned char *restrict out)
{
    if (wire == WIRE_BFLOAT16)
        pack_bfloat16(count, values, out);
    else if (wire == WIRE_FLOAT16)
        pack_float16(count, values, out);
    else if (count > 0)
        memcpy(out, values, 4 * count);
}

/* A value is finite unless all bits of its exponent are set: adding one at the exponent's lowest bit then
 * carries into the sign's place, where the bits of all values are gathered. */
MULTIVERSION static int all_finite_32(size_t count, const unsigned char *restrict message)
{
    uint32_t gathered = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, message + 4 * i, sizeof bits);
        gathered |= (bits & 0x7F800000u) + 0x00800000u;
    }
    return !(gathered & 0x80000000u);
}

MULTIVERSION static int all_finite_16(size_t count, const unsigned char *restrict message, uint32_t exponent,
                                      uint32_t lowest)
{
    uint32_t gathered = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, message + 2 * i, sizeof half);
        gathered |= (half & exponent) + lowest;
    }
    return !(gathered & 0x8000u);
}

int all_finite(enum wire wire, size_t count, const unsigned char *restrict message)
{
    switch (wire) {
    case WIRE_BFLOAT16:
        return all_finite_16(count, message, 0x7F80u, 0x0080u);
    case WIRE_FLOAT16:
        return all_finite_16(count, message, 0x7C00u, 0x0400u);
    default:
        return all_finite_32(count, message);
    }
}

/* `count` values of a message as float32. */
MULTIVERSION static void unpack(enum wire wire, size_t count, const unsigned char *restrict message,
                                float *restrict values)
{
    if (wire == WIRE_FLOAT32) {
        memcpy(values, message, 4 * count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, message + 2 * i, sizeof half);
        values[i] = wire == WIRE_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
    }
}

/* before[i] = state[i], then state[i] *= weight. */
MULTIVERSION static void begin_block(size_t count, float *restrict before, float *restrict state, float weight)
{
    for (size_t i = 0; i < count; i++) {
        before[i] = state[i];
        state[i] *= weight;
    }
}

/* state += weight * values; returns the squared distance of before to values. In double, as the square of a
 * float32 may be too large for one; in LANES interleaved sums, so that the order does not depend on the width
 * of a vector. */
MULTIVERSION static double add_block(size_t count, const float *restrict before, const float *restrict values,
                                     float weight, float *restrict state)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
#pragma omp simd
        for (size_t lane = 0; lane < LANES; lane++) {
            double difference = (double)before[i + lane] - (double)values[i + lane];
            lanes[lane] += difference * difference;
            state[i + lane] += weight * values[i + lane];
        }
    }
    for (; i < count; i++) {
        double difference = (double)before[i] - (double)values[i];
        lanes[0] += difference * difference;
        state[i] += weight * values[i];
    }
    double sum = 0;
    for (size_t lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

void mix(enum wire wire, size_t count, float *restrict state, float self_weight, size_t messages,
         const unsigned char *const *restrict message, const float *restrict weights,
         const int *restrict accepted, double *restrict squared)
{
    size_t itemsize = wire_itemsize[wire];
    float before[BLOCK], values[BLOCK];
    int any = 0;
    for (size_t k = 0; k < messages; k++) {
        squared[k] = accepted[k] ? 0.0 : (double)NAN;
        any |= accepted[k];
    }
    for (size_t begin = 0; any && begin < count; begin += BLOCK) {
        size_t length = count - begin < BLOCK ? count - begin : BLOCK;
        begin_block(length, before, state + begin, self_weight);
        for (size_t k = 0; k < messages; k++) {
            if (accepted[k]) {
                unpack(wire, length, message[k] + begin * itemsize, values);
                squared[k] += add_block(length, before, values, weights[k], state + begin);
            }
        }
    }
}

static inline uint64_t finalise(uint64_t z)
{
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

double sketch(size_t count, const float *restrict state, uint64_t seed, size_t buckets, double *restrict sums)
{
    double squared = 0;
    memset(sums, 0, buckets * sizeof *sums);
    for (size_t i = 0; i < count; i++) {
        uint64_t z = finalise(seed + ((uint64_t)i + 1) * UINT64_C(0x9E3779B97F4A7C15));
        double value = (double)state[i];
        sums[z & (buckets - 1)] += z >> 63 ? -value : value;
        squared += value * value;
    }
    return squared;
}
