/* How every call takes its arguments. Each is checked as it is taken, and belongs to the call's `held` from then on;
 * `finish` gives all of it back. What can fail returns NULL or -1, with Python's error set. */
#ifndef GALA_MPI_ARGUMENTS_H
#define GALA_MPI_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>

#include "wire.h"

/* A buffer that a call holds. It stays where it is, as a Py_buffer may point into itself. */
struct taken {
    Py_buffer view;
    const char *name;
    struct taken *next;
};

/* Buffers for which a call allocates nothing, and the most lists that one takes. */
enum { HELD_BUFFERS = 8, HELD_LISTS = 3 };

/* What a call holds. */
struct held {
    struct taken *first, **end;
    struct block *blocks;
    int buffer_count, list_count;
    struct taken buffers[HELD_BUFFERS];
    PyObject *lists[HELD_LISTS];
};

static inline void begin(struct held *held)
{
    held->first = NULL;
    held->end = &held->first;
    held->blocks = NULL;
    held->buffer_count = held->list_count = 0;
}

/* Give back all that the call holds. Returns `result`, so that a call that failed returns finish(&held, NULL). */
PyObject *finish(struct held *held, PyObject *result);

/* Memory for `count` items, not set to anything. */
void *reserve(struct held *held, size_t count, size_t size);

/* The items of a sequence, as a list that nobody else changes; the call holds the reference. */
PyObject *take_list(struct held *held, PyObject *sequence);

enum access { READ, WRITE };

/* Take a C-contiguous buffer whose items have one of the one-letter `formats`. A standard-size or native prefix of the
 * buffer's format is passed over. */
struct taken *take(struct held *held, PyObject *object, const char *name, const char *formats, enum access access);

/* The same, of values that lie at a multiple of their size. */
struct taken *take_aligned(struct held *held, PyObject *object, const char *name, const char *formats,
                           enum access access);

/* The same, of float32 values. */
struct taken *take_float32(struct held *held, PyObject *object, const char *name, enum access access);

static inline size_t floats_in(const struct taken *taken)
{
    return (size_t)taken->view.len / sizeof(float);
}

int find_wire(const char *name, enum wire *wire);

/* Take a buffer of items of the wire type, as bytes at any address or in its own format. */
struct taken *take_wire(struct held *held, PyObject *object, const char *name, enum wire wire, enum access access);

/* The same, of exactly `count` items. */
struct taken *take_values(struct held *held, PyObject *object, const char *name, enum wire wire, size_t count,
                          enum access access);

/* Fail with "<one> overlaps <other>" if they share memory. */
int refuse_overlap(const struct taken *one, const struct taken *other);

/* The same, of a buffer and each that was taken before it, in order. */
int refuse_overlap_with_earlier(const struct held *held, const struct taken *taken);

#endif
