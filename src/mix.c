#include "mix.h"

#include <math.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "wire_inline.h"

/* Values are mixed a tile at a time. A tile is small, so that the processor fetches the next one from memory while
 * it computes: tiles of 256 values made mixing a fifth slower, those of 1024 half as slow again. */
enum { TILE = 128, LANES = 16 };

INLINE void unpack(enum wire wire, size_t count, const unsigned char *restrict message, float *restrict values)
{
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, message + 2 * i, sizeof half);
        values[i] = wire == WIRE_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
    }
}

/* The squared distance of at most TILE values in double, which holds the square of every float32. Equal values,
 * which ranks have until they part, are seen first: that takes a fifth of the time. */
MULTIVERSION static double exact_distance(size_t count, const float *restrict state,
                                          const unsigned char *restrict values)
{
    double squares[TILE];
    uint32_t differ = 0;
    for (size_t i = 0; i < count; i++)
        differ |= bits_of(state[i] - float_at(values, i)) & 0x7FFFFFFFu;
    if (differ == 0)
        return 0;
    for (size_t i = 0; i < count; i++) {
        double difference = (double)state[i] - (double)float_at(values, i);
        squares[i] = difference * difference;
    }
    for (size_t i = count; i < TILE; i++)
        squares[i] = 0;
    for (size_t half = TILE / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; i++)
            squares[i] += squares[i + half];
    }
    return squares[0];
}

INLINE float square_at(const float *restrict state, const unsigned char *restrict values, size_t i)
{
    float difference = state[i] - float_at(values, i);
    return difference * difference;
}

/* The squared distance of `count` values, TILE or fewer. The second half of a tile's squares is added to the first
 * until one number is left: an order that holds for vectors of any width. In float32 that is ten roundings deep, a
 * relative error of at most 6e-7; where a square overflowed, or where what underflow may have taken (128 times
 * 2**-150) would count, and for the last values, the sum is done in double. */
INLINE double distance(size_t count, const float *restrict state, const unsigned char *restrict values)
{
    float sums[LANES];
    if (count < TILE)
        return exact_distance(count, state, values);
    for (size_t lane = 0; lane < LANES; lane++) {
        float squares[TILE / LANES];
        for (size_t row = 0; row < TILE / LANES; row++)
            squares[row] = square_at(state, values, row * LANES + lane);
        sums[lane] = ((squares[0] + squares[4]) + (squares[2] + squares[6])) +
                     ((squares[1] + squares[5]) + (squares[3] + squares[7]));
    }
    for (size_t half = LANES / 2; half > 0; half /= 2) {
        for (size_t lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    }
    return sums[0] > 0x1p-100f && sums[0] < INFINITY ? (double)sums[0] : exact_distance(TILE, state, values);
}

/* state <- own * state + weight * values. */
INLINE void add(size_t count, float *restrict state, float own, const unsigned char *restrict values, float weight)
{
    for (size_t i = 0; i < count; i++)
        state[i] = own * state[i] + weight * float_at(values, i);
}

/* One entry for each message. */
struct per_message {
    const unsigned char *const *message;
    const float *weights;
    const int *accepted;
    double *squared;
};

/* A tile of state <- own * state + sum of the accepted float32 messages, weighted, in order. */
INLINE void add_messages(size_t begin, size_t count, float *restrict state, float own, size_t messages,
                         const struct per_message *each, const int *accepted)
{
    for (size_t k = 0; k < messages; k++) {
        if (accepted[k]) {
            add(count, state + begin, own, each->message[k] + 4 * begin, each->weights[k]);
            own = 1;
        }
    }
}

/* float32 messages are read where they lie, twice: all distances of a tile come before it is mixed, so that no
 * copy of the state is needed. */
INLINE void mix_tile_32(size_t begin, size_t count, float *restrict state, float own, size_t messages,
                        const struct per_message *each)
{
    for (size_t k = 0; k < messages; k++) {
        if (each->accepted[k])
            each->squared[k] += distance(count, state + begin, each->message[k] + 4 * begin);
    }
    add_messages(begin, count, state, own, messages, each, each->accepted);
}

/* Narrow messages are unpacked once; a copy of the state serves the distances to those after the first. */
INLINE void mix_tile_16(enum wire wire, size_t begin, size_t count, float *restrict state, float own, size_t messages,
                        const struct per_message *each)
{
    float values[TILE], copy[TILE];
    const float *before = state + begin;
    if (messages > 1)
        before = memcpy(copy, before, sizeof(float) * count);
    for (size_t k = 0; k < messages; k++) {
        if (each->accepted[k]) {
            unpack(wire, count, each->message[k] + 2 * begin, values);
            each->squared[k] += distance(count, before, (const unsigned char *)values);
            add(count, state + begin, own, (const unsigned char *)values, each->weights[k]);
            own = 1;
        }
    }
}

INLINE void mix_tile(enum wire wire, size_t begin, size_t count, float *restrict state, float own, size_t messages,
                     const struct per_message *each)
{
    if (wire == WIRE_FLOAT32)
        mix_tile_32(begin, count, state, own, messages, each);
    else
        mix_tile_16(wire, begin, count, state, own, messages, each);
}

/* The loops of a full tile have a constant length, which is worth a copy of their code for the last one. */
INLINE void mix_tiles(enum wire wire, size_t count, float *restrict state, float own, size_t messages,
                      const struct per_message *each)
{
    size_t begin = 0;
    for (; begin + TILE <= count; begin += TILE)
        mix_tile(wire, begin, TILE, state, own, messages, each);
    if (begin < count)
        mix_tile(wire, begin, count - begin, state, own, messages, each);
}

/* One message, the usual case, gets a loop of its own: the loop over messages took a tenth of its time. */
INLINE void mix_wire(enum wire wire, size_t count, float *restrict state, float own, size_t messages,
                     const struct per_message *each)
{
    if (messages == 1)
        mix_tiles(wire, count, state, own, 1, each);
    else
        mix_tiles(wire, count, state, own, messages, each);
}

MULTIVERSION static void mix_float32(size_t count, float *restrict state, float own, size_t messages,
                                     const struct per_message *each)
{
    mix_wire(WIRE_FLOAT32, count, state, own, messages, each);
}

MULTIVERSION static void mix_bfloat16(size_t count, float *restrict state, float own, size_t messages,
                                      const struct per_message *each)
{
    mix_wire(WIRE_BFLOAT16, count, state, own, messages, each);
}

MULTIVERSION static void mix_float16(size_t count, float *restrict state, float own, size_t messages,
                                     const struct per_message *each)
{
    mix_wire(WIRE_FLOAT16, count, state, own, messages, each);
}

void mix(enum wire wire, size_t count, float *restrict state, float self_weight, size_t messages,
         const unsigned char *const *restrict message, const float *restrict weights,
         const int *restrict accepted, double *restrict squared)
{
    struct per_message each = {message, weights, accepted, squared};
    int any = 0;
    for (size_t k = 0; k < messages; k++) {
        squared[k] = accepted[k] ? 0.0 : (double)NAN;
        any |= accepted[k];
    }
    if (!any)
        return;
    if (wire == WIRE_BFLOAT16)
        mix_bfloat16(count, state, self_weight, messages, &each);
    else if (wire == WIRE_FLOAT16)
        mix_float16(count, state, self_weight, messages, &each);
    else
        mix_float32(count, state, self_weight, messages, &each);
}

/* Copy past the caches: the copy is for another core or the network, and what it would push out of the caches is for
 * this one. Ordered by `end_streams`. */
INLINE void stream(size_t count, const float *restrict values, unsigned char *restrict out)
{
#ifdef __SSE2__
    if (count == TILE && (uintptr_t)out % sizeof(__m128i) == 0) {
        for (size_t i = 0; i < TILE; i += 4)
            _mm_stream_si128((__m128i *)(void *)(out + 4 * i), _mm_loadu_si128((const __m128i *)(const void *)(values + i)));
        return;
    }
#endif
    memcpy(out, values, 4 * count);
}

static void end_streams(void)
{
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* Where the pass ended: at the end, or at the first tile where the state or a message accepted until now is not
 * finite; the latter is no longer accepted then. */
enum outcome { DONE, STATE_NOT_FINITE, MESSAGE_NOT_FINITE };

MULTIVERSION static int tile_finite(size_t count, const unsigned char *restrict values)
{
    return finite_32(count, values);
}

INLINE enum outcome exchange_tile(size_t begin, size_t count, float *restrict state, size_t copies,
                                  unsigned char *const *restrict copy, float own, size_t messages,
                                  const struct per_message *each, int *restrict accepted)
{
    const unsigned char *values = (const unsigned char *)(state + begin);
    int known_finite = 0;
    for (size_t k = 0; k < messages; k++) {
        if (accepted[k]) {
            /* In double this is finite if, and only if, all values are. */
            double part = distance(count, state + begin, each->message[k] + 4 * begin);
            if (!isfinite(part)) {
                if (!tile_finite(count, values))
                    return STATE_NOT_FINITE;
                accepted[k] = 0;
                return MESSAGE_NOT_FINITE;
            }
            each->squared[k] += part;
            known_finite = 1;
        }
    }
    if (!known_finite && !tile_finite(count, values))
        return STATE_NOT_FINITE;
    for (size_t k = 0; k < copies; k++)
        stream(count, state + begin, copy[k] + 4 * begin);
    add_messages(begin, count, state, own, messages, each, accepted);
    return DONE;
}

MULTIVERSION static enum outcome exchange_tiles(size_t count, float *restrict state, size_t copies,
                                                unsigned char *const *restrict copy, float own, size_t messages,
                                                const struct per_message *each, int *restrict accepted,
                                                size_t *restrict reached)
{
    enum outcome outcome = DONE;
    size_t begin = 0;
    for (; outcome == DONE && begin + TILE <= count; begin += TILE)
        outcome = exchange_tile(begin, TILE, state, copies, copy, own, messages, each, accepted);
    if (outcome == DONE && begin < count)
        outcome = exchange_tile(begin, count - begin, state, copies, copy, own, messages, each, accepted);
    else if (outcome != DONE)
        begin -= TILE;
    *reached = begin;
    return outcome;
}

int exchange(size_t count, float *restrict state, size_t copies, unsigned char *const *restrict copy,
             double self_weight, size_t messages, const unsigned char *const *restrict message,
             const float *restrict weights, int *restrict accepted, double *restrict squared)
{
    struct per_message each = {message, weights, accepted, squared};
    for (;;) {
        double own = self_weight;
        int any = 0;
        size_t reached;
        for (size_t k = 0; k < messages; k++) {
            squared[k] = accepted[k] ? 0.0 : (double)NAN;
            own += accepted[k] ? 0.0 : (double)weights[k];
            any |= accepted[k];
        }
        enum outcome outcome =
            exchange_tiles(count, state, copies, copy, any ? (float)own : 1.0f, messages, &each, accepted, &reached);
        end_streams();
        if (outcome != MESSAGE_NOT_FINITE)
            return outcome == DONE;
        /* What was mixed until there is in the first copy as it was. Then all again, without that message. */
        memcpy(state, copy[0], 4 * reached);
    }
}

MULTIVERSION void average(size_t count, float *restrict state, const unsigned char *restrict message)
{
    add(count, state, 0.5f, message, 0.5f);
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
