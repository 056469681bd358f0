#include "arguments.h"

#include <stdint.h>
#include <string.h>

/* Memory that a call holds. */
struct block {
    struct block *next;
    max_align_t memory[];
};

PyObject *finish(struct held *held, PyObject *result)
{
    /* Buffers first: some may lie in blocks. */
    for (struct taken *taken = held->first; taken != NULL; taken = taken->next)
        PyBuffer_Release(&taken->view);
    while (held->list_count > 0)
        Py_DECREF(held->lists[--held->list_count]);
    for (struct block *block = held->blocks, *next; block != NULL; block = next) {
        next = block->next;
        PyMem_Free(block);
    }
    return result;
}

void *reserve(struct held *held, size_t count, size_t size)
{
    struct block *block = PyMem_Malloc(sizeof *block + count * size);
    if (block == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    block->next = held->blocks;
    held->blocks = block;
    return block->memory;
}

PyObject *take_list(struct held *held, PyObject *sequence)
{
    PyObject *list = PySequence_List(sequence);
    if (list != NULL)
        held->lists[held->list_count++] = list;
    return list;
}

/* Whether a format is one of the one-letter `formats`, after a prefix for native or standard size. */
static int is_one_of(const char *formats, const char *format)
{
    if (format[0] == '@' || format[0] == '=' || format[0] == '<')
        format++;
    return format[0] != '\0' && format[1] == '\0' && strchr(formats, format[0]) != NULL;
}

/* Whether a buffer is what the call wants, but for its length and place. */
static int check(const struct taken *taken, const char *formats, enum access access)
{
    const char *name = taken->name, *format = taken->view.format == NULL ? "B" : taken->view.format;
    if (!is_one_of(formats, format))
        PyErr_Format(PyExc_TypeError, "%s: format '%s' is not accepted; expected one of '%s'", name, format, formats);
    else if (!PyBuffer_IsContiguous(&taken->view, 'C'))
        PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous buffer", name);
    else if (access == WRITE && taken->view.readonly)
        PyErr_Format(PyExc_ValueError, "%s: expected a writable buffer, got a read-only one", name);
    else
        return 0;
    return -1;
}

struct taken *take(struct held *held, PyObject *object, const char *name, const char *formats, enum access access)
{
    struct taken *taken = held->buffer_count < HELD_BUFFERS ? &held->buffers[held->buffer_count++]
                                                            : reserve(held, 1, sizeof *taken);
    if (taken == NULL)
        return NULL;
    if (PyObject_GetBuffer(object, &taken->view, PyBUF_STRIDES | PyBUF_FORMAT) < 0) {
        PyErr_Format(PyExc_TypeError, "%s: expected an object with a buffer of format '%s'", name, formats);
        return NULL;
    }
    taken->name = name;
    taken->next = NULL;
    *held->end = taken;
    held->end = &taken->next;
    return check(taken, formats, access) < 0 ? NULL : taken;
}

struct taken *take_aligned(struct held *held, PyObject *object, const char *name, const char *formats,
                           enum access access)
{
    struct taken *taken = take(held, object, name, formats, access);
    if (taken == NULL || (uintptr_t)taken->view.buf % (uintptr_t)taken->view.itemsize == 0)
        return taken;
    PyErr_Format(PyExc_ValueError, "%s: expected values at a multiple of %zd bytes", name, taken->view.itemsize);
    return NULL;
}

struct taken *take_float32(struct held *held, PyObject *object, const char *name, enum access access)
{
    return take_aligned(held, object, name, "f", access);
}

/* Formats that a buffer of each wire type may have: bytes, or its own. */
static const char *const wire_formats[WIRE_COUNT] = {"Bf", "BH", "BeH"};

int find_wire(const char *name, enum wire *wire)
{
    for (int i = 0; i < WIRE_COUNT; i++) {
        if (strcmp(name, wire_names[i]) == 0) {
            *wire = (enum wire)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "wire: '%s' is unknown; expected float32, bfloat16 or float16", name);
    return -1;
}

struct taken *take_wire(struct held *held, PyObject *object, const char *name, enum wire wire, enum access access)
{
    return take(held, object, name, wire_formats[wire], access);
}

struct taken *take_values(struct held *held, PyObject *object, const char *name, enum wire wire, size_t count,
                          enum access access)
{
    struct taken *taken = take_wire(held, object, name, wire, access);
    if (taken == NULL || (size_t)taken->view.len == count * wire_itemsize[wire])
        return taken;
    PyErr_Format(PyExc_ValueError, "%s: expected %zu bytes (%zu values of %s), got %zd", name,
                 count * wire_itemsize[wire], count, wire_names[wire], taken->view.len);
    return NULL;
}

static int overlap(const Py_buffer *a, const Py_buffer *b)
{
    uintptr_t a_begin = (uintptr_t)a->buf, b_begin = (uintptr_t)b->buf;
    return a->len > 0 && b->len > 0 && a_begin < b_begin + (uintptr_t)b->len && b_begin < a_begin + (uintptr_t)a->len;
}

int refuse_overlap(const struct taken *one, const struct taken *other)
{
    if (!overlap(&one->view, &other->view))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: overlaps %s; expected separate memory", one->name, other->name);
    return -1;
}

int refuse_overlap_with_earlier(const struct held *held, const struct taken *taken)
{
    for (const struct taken *earlier = held->first; earlier != taken; earlier = earlier->next) {
        if (refuse_overlap(taken, earlier) < 0)
            return -1;
    }
    return 0;
}
