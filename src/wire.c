#include "wire.h"

#include <string.h>

#include "wire_inline.h"

const size_t wire_itemsize[WIRE_COUNT] = {4, 2, 2};
const char *const wire_names[WIRE_COUNT] = {"float32", "bfloat16", "float16"};

INLINE void pack_halves(enum wire wire, size_t count, const unsigned char *restrict values, unsigned char *restrict out)
{
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, values + 4 * i, sizeof value);
        uint16_t half = wire == WIRE_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
        memcpy(out + 2 * i, &half, sizeof half);
    }
}

MULTIVERSION static void pack_bfloat16(size_t count, const unsigned char *restrict values, unsigned char *restrict out)
{
    pack_halves(WIRE_BFLOAT16, count, values, out);
}

MULTIVERSION static void pack_float16(size_t count, const unsigned char *restrict values, unsigned char *restrict out)
{
    pack_halves(WIRE_FLOAT16, count, values, out);
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

MULTIVERSION static int all_finite_32(size_t count, const unsigned char *restrict message)
{
    return finite_32(count, message);
}

MULTIVERSION static int all_finite_16(size_t count, const unsigned char *restrict message, uint16_t exponent,
                                      uint16_t lowest)
{
    uint16_t gathered = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, message + 2 * i, sizeof half);
        gathered |= (uint16_t)((half & exponent) + lowest);
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
