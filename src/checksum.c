/* The checksum of a message, and a copy that is checked as it is made. */
#include "checksum.h"

#include <stdatomic.h>
#include <string.h>

#include "multiversion.h"

/* Lanes that do not wait for each other, of words of 8 bytes. Each takes in a word as xxHash64 does: two products with
 * odd numbers and a rotation, which lose nothing, so a change of one word always shows, whatever comes behind it. */
#define LANES 8
#define BLOCK_BYTES (LANES * sizeof(uint64_t))
/* Copied before it is taken in, so that it lies in the processor's cache then. A multiple of a block. */
#define CHUNK_BYTES 4096

#define PRIME_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME_2 UINT64_C(0xC2B2AE3D27D4EB4F)

INLINE uint64_t take_in(uint64_t lane, uint64_t word)
{
    lane += word * PRIME_2;
    return ((lane << 31) | (lane >> 33)) * PRIME_1;
}

INLINE uint64_t finalise(uint64_t z)
{
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

INLINE void begin_lanes(uint64_t lanes[LANES], uint64_t seed)
{
    for (int i = 0; i < LANES; i++)
        lanes[i] = seed + (uint64_t)i * PRIME_1;
}

/* What does not fill a block is padded with zeros: its length goes into the end. */
INLINE void take_in_all(uint64_t lanes[LANES], size_t nbytes, const unsigned char *memory)
{
    uint64_t words[LANES];
    size_t place = 0;
    for (; nbytes - place >= BLOCK_BYTES; place += BLOCK_BYTES) {
        memcpy(words, memory + place, BLOCK_BYTES);
        for (int i = 0; i < LANES; i++)
            lanes[i] = take_in(lanes[i], words[i]);
    }
    if (place < nbytes) {
        memset(words, 0, sizeof words);
        memcpy(words, memory + place, nbytes - place);
        for (int i = 0; i < LANES; i++)
            lanes[i] = take_in(lanes[i], words[i]);
    }
}

INLINE uint64_t end_lanes(const uint64_t lanes[LANES], size_t nbytes)
{
    uint64_t sum = finalise(nbytes);
    for (int i = 0; i < LANES; i++)
        sum = take_in(sum, lanes[i]);
    return finalise(sum);
}

MULTIVERSION uint64_t checksum(size_t nbytes, const unsigned char *memory, uint64_t seed)
{
    uint64_t lanes[LANES];
    begin_lanes(lanes, seed);
    take_in_all(lanes, nbytes, memory);
    return end_lanes(lanes, nbytes);
}

MULTIVERSION uint64_t checked_copy(size_t nbytes, const unsigned char *from, unsigned char *to, uint64_t seed)
{
    uint64_t lanes[LANES];
    begin_lanes(lanes, seed);
    for (size_t place = 0; place < nbytes; place += CHUNK_BYTES) {
        size_t length = nbytes - place < CHUNK_BYTES ? nbytes - place : CHUNK_BYTES;
        memcpy(to + place, from + place, length);
        /* The source may change at any time: what is taken in must be what was copied, not read once more. */
        atomic_signal_fence(memory_order_seq_cst);
        take_in_all(lanes, length, to + place);
    }
    return end_lanes(lanes, nbytes);
}
