/* The Python binding of the kernels: checks every buffer, then runs the kernel without the interpreter's lock. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "learn.h"
#include "mix.h"
#include "watch.h"

static const char *const wire_names[WIRE_COUNT] = {"float32", "bfloat16", "float16"};
/* Formats, besides bytes, that a buffer of each wire type may have. */
static const char *const wire_formats[WIRE_COUNT] = {"f", "H", "eH"};

static int find_wire(const char *name, enum wire *wire)
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

/* Take a contiguous buffer whose items have one of the one-letter `formats`. A standard-size or native prefix
 * of the buffer's format is passed over. On failure nothing is held. */
static int take(PyObject *object, const char *name, const char *formats, int writable, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT) < 0) {
        PyErr_Format(PyExc_TypeError, "%s: expected an object with a buffer of format '%s'", name, formats);
        return -1;
    }
    const char *format = view->format == NULL ? "B" : view->format;
    if (strchr("@=<", format[0]) != NULL && format[0] != '\0')
        format++;
    if (strlen(format) != 1 || strchr(formats, format[0]) == NULL)
        PyErr_Format(PyExc_TypeError, "%s: format '%s' is not accepted; expected one of '%s'", name,
                     view->format == NULL ? "B" : view->format, formats);
    else if (!PyBuffer_IsContiguous(view, 'C'))
        PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous buffer", name);
    else if (writable && view->readonly)
        PyErr_Format(PyExc_ValueError, "%s: expected a writable buffer, got a read-only one", name);
    else
        return 0;
    PyBuffer_Release(view);
    return -1;
}

/* Take a buffer of values that lie at a multiple of their size. */
static int take_aligned(PyObject *object, const char *name, const char *formats, int writable, Py_buffer *view)
{
    if (take(object, name, formats, writable, view) < 0)
        return -1;
    if ((uintptr_t)view->buf % (uintptr_t)view->itemsize == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected values at a multiple of %zd bytes", name, view->itemsize);
    PyBuffer_Release(view);
    return -1;
}

static int take_float32(PyObject *object, const char *name, int writable, Py_buffer *view)
{
    return take_aligned(object, name, "f", writable, view);
}

/* Take a buffer of items of the wire type, as bytes or in its own format. */
static int take_wire_format(PyObject *object, const char *name, enum wire wire, int writable, Py_buffer *view)
{
    char formats[8] = "B";
    strcat(formats, wire_formats[wire]);
    return take(object, name, formats, writable, view);
}

/* The same, of exactly `count` items. */
static int take_wire(PyObject *object, const char *name, enum wire wire, size_t count, int writable, Py_buffer *view)
{
    if (take_wire_format(object, name, wire, writable, view) < 0)
        return -1;
    if ((size_t)view->len == count * wire_itemsize[wire])
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %zu bytes (%zu values of %s), got %zd", name,
                 count * wire_itemsize[wire], count, wire_names[wire], view->len);
    PyBuffer_Release(view);
    return -1;
}

static int overlap(const Py_buffer *a, const Py_buffer *b)
{
    uintptr_t a_begin = (uintptr_t)a->buf, b_begin = (uintptr_t)b->buf;
    return a->len > 0 && b->len > 0 && a_begin < b_begin + (uintptr_t)b->len && b_begin < a_begin + (uintptr_t)a->len;
}

static int refuse_overlap(const char *written, const char *read, const Py_buffer *a, const Py_buffer *b)
{
    if (!overlap(a, b))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: overlaps %s; expected separate memory", written, read);
    return -1;
}

static void release(Py_buffer *views, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        PyBuffer_Release(&views[i]);
    PyMem_Free(views);
}

PyDoc_STRVAR(pack_doc,
"pack(sources, out, wire='float32')\n--\n\n"
"Gather float32 buffers, in order, into one buffer of the wire type.\n\n"
"sources: sequence of C-contiguous float32 buffers of any shape. out: writable buffer of bytes, or of the wire\n"
"type, that holds exactly as many values. Rounds to nearest even. Raises TypeError for a wrong type, ValueError\n"
"for a wrong length, layout or overlap. Local.");

static PyObject *py_pack(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sources", "out", "wire", NULL};
    PyObject *sources, *out_object, *list = NULL, *result = NULL;
    const char *wire_name = "float32";
    enum wire wire;
    Py_buffer *views = NULL, out;
    Py_ssize_t taken = 0;
    size_t count = 0;
    int have_out = 0;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|s", names, &sources, &out_object, &wire_name) ||
        find_wire(wire_name, &wire) < 0)
        return NULL;
    list = PySequence_List(sources);
    if (list == NULL)
        goto done;
    views = PyMem_Calloc((size_t)PyList_Size(list) + 1, sizeof *views);
    if (views == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (; taken < PyList_Size(list); taken++) {
        if (take_float32(PyList_GetItem(list, taken), "sources", 0, &views[taken]) < 0)
            goto done;
        count += (size_t)views[taken].len / sizeof(float);
    }
    if (take_wire(out_object, "out", wire, count, 1, &out) < 0)
        goto done;
    have_out = 1;
    for (Py_ssize_t i = 0; i < taken; i++) {
        if (refuse_overlap("out", "sources", &out, &views[i]) < 0)
            goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    unsigned char *place = out.buf;
    for (Py_ssize_t i = 0; i < taken; i++) {
        size_t length = (size_t)views[i].len / sizeof(float);
        pack(wire, length, views[i].buf, place);
        place += length * wire_itemsize[wire];
    }
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    if (have_out)
        PyBuffer_Release(&out);
    if (views != NULL)
        release(views, taken);
    Py_XDECREF(list);
    return result;
}

/* Operands of one mix, each an array of `count` entries in one block of memory. */
struct operands {
    Py_ssize_t count, taken;
    PyObject *message_list, *weight_list;
    Py_buffer *views;
    const unsigned char **message;
    double *squared;
    float *weights;
    int *accepted;
};

static int allocate(struct operands *ops, Py_ssize_t count)
{
    size_t n = (size_t)count + 1;
    ops->count = count;
    ops->views = PyMem_Calloc(n, sizeof *ops->views);
    ops->message = PyMem_Calloc(n, sizeof *ops->message);
    ops->squared = PyMem_Calloc(n, sizeof *ops->squared);
    ops->weights = PyMem_Calloc(n, sizeof *ops->weights);
    ops->accepted = PyMem_Calloc(n, sizeof *ops->accepted);
    if (ops->views && ops->message && ops->squared && ops->weights && ops->accepted)
        return 0;
    PyErr_NoMemory();
    return -1;
}

static void free_operands(struct operands *ops)
{
    if (ops->views != NULL)
        release(ops->views, ops->taken);
    PyMem_Free((void *)ops->message);
    PyMem_Free(ops->squared);
    PyMem_Free(ops->weights);
    PyMem_Free(ops->accepted);
    Py_XDECREF(ops->message_list);
    Py_XDECREF(ops->weight_list);
}

static int read_weight(PyObject *object, const char *name, float *weight)
{
    double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred())
        return -1;
    *weight = (float)value;
    if (isfinite(*weight))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected finite numbers, got %R", name, object);
    return -1;
}

static int read_operands(struct operands *ops, PyObject *messages, PyObject *weights, const Py_buffer *state,
                         enum wire wire)
{
    size_t count = (size_t)state->len / sizeof(float);
    ops->message_list = PySequence_List(messages);
    ops->weight_list = ops->message_list == NULL ? NULL : PySequence_List(weights);
    if (ops->weight_list == NULL)
        return -1;
    if (PyList_Size(ops->weight_list) != PyList_Size(ops->message_list)) {
        PyErr_Format(PyExc_ValueError, "weights: expected one for each of the %zd messages, got %zd",
                     PyList_Size(ops->message_list), PyList_Size(ops->weight_list));
        return -1;
    }
    if (allocate(ops, PyList_Size(ops->message_list)) < 0)
        return -1;
    for (Py_ssize_t k = 0; k < ops->count; k++) {
        if (read_weight(PyList_GetItem(ops->weight_list, k), "weights", &ops->weights[k]) < 0 ||
            take_wire(PyList_GetItem(ops->message_list, k), "messages", wire, count, 0, &ops->views[k]) < 0)
            return -1;
        ops->taken++;
        ops->message[k] = ops->views[k].buf;
        if (refuse_overlap("state", "messages", state, &ops->views[k]) < 0)
            return -1;
    }
    return 0;
}

/* A pass that writes in place cannot refuse what it finds half way: look first, then mix. */
static void check_and_mix(struct operands *ops, const Py_buffer *state, double self_weight, enum wire wire)
{
    size_t count = (size_t)state->len / sizeof(float);
    for (Py_ssize_t k = 0; k < ops->count; k++) {
        ops->accepted[k] = all_finite(wire, count, ops->message[k]);
        if (!ops->accepted[k])
            self_weight += (double)ops->weights[k];
    }
    mix(wire, count, state->buf, (float)self_weight, (size_t)ops->count, ops->message, ops->weights, ops->accepted,
        ops->squared);
}

static PyObject *mix_result(const struct operands *ops)
{
    PyObject *squared = PyList_New(ops->count), *accepted = PyList_New(ops->count), *result = NULL;
    for (Py_ssize_t k = 0; squared != NULL && accepted != NULL && k < ops->count; k++) {
        PyObject *number = PyFloat_FromDouble(ops->squared[k]), *flag = PyBool_FromLong(ops->accepted[k]);
        /* Both steal the reference; a missing number leaves an error set. */
        PyList_SetItem(squared, k, number);
        PyList_SetItem(accepted, k, flag);
    }
    if (squared != NULL && accepted != NULL && !PyErr_Occurred())
        result = PyTuple_Pack(2, squared, accepted);
    Py_XDECREF(squared);
    Py_XDECREF(accepted);
    return result;
}

PyDoc_STRVAR(mix_doc,
"mix(state, self_weight, messages, weights, wire='float32')\n--\n\n"
"state <- self_weight * state + sum of weights[k] * messages[k], in place.\n\n"
"state: writable float32 buffer (n,). messages: buffers of n values of the wire type, as bytes at any address or\n"
"in its own format. Returns (squared distances of state, before, to each message; whether each was accepted). A\n"
"message with a value that is not finite is not accepted: its weight goes to state itself, its distance is NaN,\n"
"and if none is accepted state is left as it was. Raises TypeError for a wrong type, ValueError for a wrong\n"
"length, layout, overlap or weight. Local.");

static PyObject *py_mix(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state", "self_weight", "messages", "weights", "wire", NULL};
    PyObject *state_object, *self_object, *messages, *weights, *result = NULL;
    const char *wire_name = "float32";
    enum wire wire;
    float self_weight;
    Py_buffer state;
    struct operands ops = {0};

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|s", names, &state_object, &self_object, &messages, &weights,
                                     &wire_name) ||
        find_wire(wire_name, &wire) < 0 || read_weight(self_object, "self_weight", &self_weight) < 0 ||
        take_float32(state_object, "state", 1, &state) < 0)
        return NULL;
    if (read_operands(&ops, messages, weights, &state, wire) < 0)
        goto done;
    double own = PyFloat_AsDouble(self_object);
    Py_BEGIN_ALLOW_THREADS
    check_and_mix(&ops, &state, own, wire);
    Py_END_ALLOW_THREADS
    result = mix_result(&ops);
done:
    free_operands(&ops);
    PyBuffer_Release(&state);
    return result;
}

PyDoc_STRVAR(exchange_doc,
"exchange(state, copies, self_weight, messages, weights)\n--\n\n"
"Copy the state, and mix, in one pass: each of copies <- state, then as `mix` with float32 messages.\n\n"
"state: writable float32 buffer (n,). copies: writable buffers of n float32 values, one at least, and messages: buffers\n"
"of as many, all as bytes at any address or in their own format. Returns (whether state was finite; squared distances\n"
"of state, before, to each message; whether each was accepted). If state was not finite, state and copies hold neither\n"
"the old values nor the new. A message with a value that is not finite is not accepted, as in `mix`. Raises TypeError\n"
"for a wrong type, ValueError for a wrong length, layout, overlap or weight, or for no copy. Local.");

static PyObject *py_exchange(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state", "copies", "self_weight", "messages", "weights", NULL};
    PyObject *state_object, *self_object, *messages, *weights, *copies;
    PyObject *copy_list = NULL, *mixed = NULL, *result = NULL;
    float self_weight;
    Py_buffer state, *views = NULL;
    Py_ssize_t taken = 0, wanted = 0;
    unsigned char **copy = NULL;
    struct operands ops = {0};
    int finite;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO", names, &state_object, &copies, &self_object, &messages,
                                     &weights) ||
        read_weight(self_object, "self_weight", &self_weight) < 0 ||
        take_float32(state_object, "state", 1, &state) < 0)
        return NULL;
    size_t count = (size_t)state.len / sizeof(float);
    if (read_operands(&ops, messages, weights, &state, WIRE_FLOAT32) < 0)
        goto done;
    copy_list = PySequence_List(copies);
    if (copy_list == NULL)
        goto done;
    wanted = PyList_Size(copy_list);
    if (wanted == 0) {
        PyErr_SetString(PyExc_ValueError, "copies: expected one at least");
        goto done;
    }
    views = PyMem_Calloc((size_t)wanted, sizeof *views);
    copy = PyMem_Calloc((size_t)wanted, sizeof *copy);
    if (views == NULL || copy == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (; taken < wanted; taken++) {
        if (take_wire(PyList_GetItem(copy_list, taken), "copies", WIRE_FLOAT32, count, 1, &views[taken]) < 0)
            goto done;
        copy[taken] = views[taken].buf;
        int overlaps = refuse_overlap("copies", "state", &views[taken], &state);
        for (Py_ssize_t k = 0; !overlaps && k < ops.count; k++)
            overlaps = refuse_overlap("copies", "messages", &views[taken], &ops.views[k]);
        for (Py_ssize_t k = 0; !overlaps && k < taken; k++)
            overlaps = refuse_overlap("copies", "copies", &views[taken], &views[k]);
        if (overlaps) {
            taken++;
            goto done;
        }
    }
    double own = PyFloat_AsDouble(self_object);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t k = 0; k < ops.count; k++)
        ops.accepted[k] = 1;
    finite = exchange(count, state.buf, (size_t)wanted, copy, own, (size_t)ops.count, ops.message, ops.weights,
                      ops.accepted, ops.squared);
    Py_END_ALLOW_THREADS
    mixed = mix_result(&ops);
    if (mixed != NULL)
        result = Py_BuildValue("NOO", PyBool_FromLong(finite), PyTuple_GetItem(mixed, 0), PyTuple_GetItem(mixed, 1));
done:
    Py_XDECREF(mixed);
    if (views != NULL)
        release(views, taken);
    PyMem_Free(copy);
    free_operands(&ops);
    PyBuffer_Release(&state);
    Py_XDECREF(copy_list);
    return result;
}

PyDoc_STRVAR(all_finite_doc,
"all_finite(buffer, wire='float32')\n--\n\n"
"Whether no value of a buffer is an infinity or a NaN; so for an empty one.\n\n"
"buffer: C-contiguous buffer of the wire type, as bytes at any address or in its own format. Raises TypeError for a\n"
"wrong type, ValueError for a wrong length or layout. Local.");

static PyObject *py_all_finite(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "wire", NULL};
    PyObject *buffer_object;
    const char *wire_name = "float32";
    enum wire wire;
    Py_buffer buffer;
    int finite;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s", names, &buffer_object, &wire_name) ||
        find_wire(wire_name, &wire) < 0 || take_wire_format(buffer_object, "buffer", wire, 0, &buffer) < 0)
        return NULL;
    size_t count = (size_t)buffer.len / wire_itemsize[wire];
    if ((size_t)buffer.len % wire_itemsize[wire] != 0) {
        PyErr_Format(PyExc_ValueError, "buffer: expected whole values of %s (%zu bytes each), got %zd bytes", wire_name,
                     wire_itemsize[wire], buffer.len);
        PyBuffer_Release(&buffer);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    finite = all_finite(wire, count, buffer.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return PyBool_FromLong(finite);
}

PyDoc_STRVAR(average_doc,
"average(state, message)\n--\n\n"
"state <- 0.5 * state + 0.5 * message, in place: the yardstick of memory speed that `mix` is measured by.\n\n"
"Two reads and a write for each value, without the check that the message is finite and without the distance; not\n"
"for use in training. state: writable float32 buffer (n,). message: buffer of n float32 values, as bytes at any\n"
"address or in its own format. Raises TypeError for a wrong type, ValueError for a wrong length, layout or overlap.\n"
"Local.");

static PyObject *py_average(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state", "message", NULL};
    PyObject *state_object, *message_object, *result = NULL;
    Py_buffer state, message;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &state_object, &message_object) ||
        take_float32(state_object, "state", 1, &state) < 0)
        return NULL;
    size_t count = (size_t)state.len / sizeof(float);
    if (take_wire(message_object, "message", WIRE_FLOAT32, count, 0, &message) < 0)
        goto done;
    if (refuse_overlap("state", "message", &state, &message) == 0) {
        Py_BEGIN_ALLOW_THREADS
        average(count, state.buf, message.buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&message);
done:
    PyBuffer_Release(&state);
    return result;
}

PyDoc_STRVAR(sketch_doc,
"sketch(state, out, seed)\n--\n\n"
"Count sketch of a float32 buffer into `out`; returns the squared norm of the buffer itself.\n\n"
"state: float32 buffer (n,). out: writable float32 buffer (d,), d a power of two of at least 2. seed: 0 <= seed <\n"
"2**64. Sketches of one seed are linear: the squared norm of a difference of two estimates that of what they were\n"
"drawn from, with relative standard error sqrt(2/d). Raises TypeError or ValueError. Local.");

static PyObject *py_sketch(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state", "out", "seed", NULL};
    PyObject *state_object, *out_object, *seed_object, *result = NULL;
    Py_buffer state, out;
    double *sums = NULL, squared;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &state_object, &out_object, &seed_object))
        return NULL;
    uint64_t seed = PyLong_AsUnsignedLongLong(seed_object);
    if (PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_SetString(PyExc_ValueError, "seed: expected an integer from 0 to 2**64 - 1");
        return NULL;
    }
    if (take_float32(state_object, "state", 0, &state) < 0)
        return NULL;
    if (take_float32(out_object, "out", 1, &out) < 0) {
        PyBuffer_Release(&state);
        return NULL;
    }
    size_t buckets = (size_t)out.len / sizeof(float);
    if (buckets < 2 || (buckets & (buckets - 1)) != 0) {
        PyErr_Format(PyExc_ValueError, "out: expected a power of two of values, at least 2, got %zu", buckets);
        goto done;
    }
    if (refuse_overlap("out", "state", &out, &state) < 0)
        goto done;
    sums = PyMem_Malloc(buckets * sizeof *sums);
    if (sums == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    squared = sketch((size_t)state.len / sizeof(float), state.buf, seed, buckets, sums);
    for (size_t i = 0; i < buckets; i++)
        ((float *)out.buf)[i] = (float)sums[i];
    Py_END_ALLOW_THREADS
    result = PyFloat_FromDouble(squared);
done:
    PyMem_Free(sums);
    PyBuffer_Release(&out);
    PyBuffer_Release(&state);
    return result;
}

PyDoc_STRVAR(checksum_doc,
"checksum(buffer)\n--\n\n"
"Sum, modulo 2**64, of a buffer's 32-bit words in the machine's byte order, and of the bytes behind the last one.\n\n"
"buffer: contiguous bytes at any address. Tells a message that arrived in part from a whole one, not more. Raises\n"
"TypeError or ValueError. Local.");

static PyObject *py_checksum(PyObject *Py_UNUSED(module), PyObject *object)
{
    Py_buffer buffer;
    uint64_t sum;

    if (take(object, "buffer", "B", 0, &buffer) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    sum = checksum((size_t)buffer.len, buffer.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return PyLong_FromUnsignedLongLong(sum);
}

PyDoc_STRVAR(scale_frames_doc,
"scale_frames(frames, out)\n--\n\n"
"out <- frames / 255, with the planes of a pixel side by side.\n\n"
"frames: C-contiguous bytes (n, planes, height, width). out: writable C-contiguous buffer (n, height, width, planes) of\n"
"float32, or of uint16 for the bits of bfloat16. Raises TypeError for a wrong type, ValueError for a wrong shape, layout or overlap. Local.");

static PyObject *py_scale_frames(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"frames", "out", NULL};
    PyObject *frames_object, *out_object, *result = NULL;
    Py_buffer frames, out;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &frames_object, &out_object) ||
        take(frames_object, "frames", "B", 0, &frames) < 0)
        return NULL;
    if (take_aligned(out_object, "out", "fH", 1, &out) < 0) {
        PyBuffer_Release(&frames);
        return NULL;
    }
    int narrow = out.itemsize == sizeof(uint16_t);
    const Py_ssize_t *in_shape = frames.shape, *out_shape = out.shape;
    if (frames.ndim != 4 || out.ndim != 4 || out_shape[0] != in_shape[0] || out_shape[1] != in_shape[2] ||
        out_shape[2] != in_shape[3] || out_shape[3] != in_shape[1])
        PyErr_SetString(PyExc_ValueError,
                        "out: expected the shape (n, height, width, planes) for frames (n, planes, height, width)");
    else if (refuse_overlap("out", "frames", &out, &frames) == 0) {
        Py_BEGIN_ALLOW_THREADS
        size_t images = (size_t)in_shape[0], planes = (size_t)in_shape[1], pixels = (size_t)(in_shape[2] * in_shape[3]);
        if (narrow)
            scale_frames_bfloat16(images, planes, pixels, frames.buf, out.buf);
        else
            scale_frames(images, planes, pixels, frames.buf, out.buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&frames);
    return result;
}

PyDoc_STRVAR(rmsprop_doc,
"rmsprop(data, grad, square, scale, learning_rate, alpha, epsilon)\n--\n\n"
"One step of RMSprop on `scale` times the gradient, in place.\n\n"
"data, square: writable float32 buffers (n,), the parameters and the running mean of squares; grad: float32 buffer\n"
"(n,). square <- alpha * square + (1 - alpha) * g * g, then data <- data - learning_rate * g / (sqrt(square) +\n"
"epsilon), as torch.optim.RMSprop. Raises TypeError for a wrong type, ValueError for a wrong length, layout or\n"
"overlap. Local.");

static PyObject *py_rmsprop(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "grad", "square", "scale", "learning_rate", "alpha", "epsilon", NULL};
    static const char *const buffer_names[] = {"data", "grad", "square"};
    PyObject *objects[3], *result = NULL;
    float scale, learning_rate, epsilon;
    double alpha;
    Py_buffer views[3];
    int taken = 0;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOffdf", names, &objects[0], &objects[1], &objects[2], &scale,
                                     &learning_rate, &alpha, &epsilon))
        return NULL;
    for (; taken < 3; taken++) {
        if (take_float32(objects[taken], buffer_names[taken], taken != 1, &views[taken]) < 0)
            goto done;
        int wrong = views[taken].len != views[0].len;
        if (wrong)
            PyErr_Format(PyExc_ValueError, "%s: expected %zd bytes, as data has, got %zd", buffer_names[taken],
                         views[0].len, views[taken].len);
        for (int k = 0; !wrong && k < taken; k++)
            wrong = refuse_overlap(buffer_names[taken], buffer_names[k], &views[taken], &views[k]);
        if (wrong) {
            taken++;
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    rmsprop((size_t)views[0].len / sizeof(float), views[0].buf, views[1].buf, views[2].buf, scale, learning_rate,
            alpha, epsilon);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    while (taken-- > 0)
        PyBuffer_Release(&views[taken]);
    return result;
}

/* Words that several processes share: their atomics must be the processor's own, not a lock inside one process. */
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(_Atomic long long) == sizeof(int64_t),
               "64-bit atomics are not lock-free here");

static _Atomic long long *take_word(PyObject *object, int writable, Py_buffer *view)
{
    if (take(object, "word", "Blq", writable, view) < 0)
        return NULL;
    if (view->len == sizeof(int64_t) && (uintptr_t)view->buf % sizeof(int64_t) == 0)
        return view->buf;
    PyErr_Format(PyExc_ValueError, "word: expected 8 bytes at a multiple of 8, got %zd", view->len);
    PyBuffer_Release(view);
    return NULL;
}

PyDoc_STRVAR(swap_doc,
"swap(word, value)\n--\n\n"
"Atomically write a 64-bit integer in memory that processes share, and return what was there before.\n\n"
"word: writable buffer of 8 bytes, at a multiple of 8. Stores of this thread before it are seen by whoever sees\n"
"`value`, through `swap` or `load`; loads after it see what came before the value that it returns. Raises TypeError,\n"
"ValueError or OverflowError. Local.");

static PyObject *py_swap(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"word", "value", NULL};
    PyObject *object;
    long long value;
    Py_buffer view;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL", names, &object, &value))
        return NULL;
    _Atomic long long *word = take_word(object, 1, &view);
    if (word == NULL)
        return NULL;
    long long before = atomic_exchange(word, value);
    PyBuffer_Release(&view);
    return PyLong_FromLongLong(before);
}

PyDoc_STRVAR(load_doc,
"load(word)\n--\n\n"
"Atomically read a 64-bit integer in memory that processes share; see `swap`.\n\n"
"word: buffer of 8 bytes, at a multiple of 8. Raises TypeError or ValueError. Local.");

static PyObject *py_load(PyObject *Py_UNUSED(module), PyObject *object)
{
    Py_buffer view;
    _Atomic long long *word = take_word(object, 0, &view);
    if (word == NULL)
        return NULL;
    long long value = atomic_load(word);
    PyBuffer_Release(&view);
    return PyLong_FromLongLong(value);
}

PyDoc_STRVAR(watch_doc,
"watch(seconds, message)\n--\n\n"
"End the process by SIGABRT, after the message on stderr, unless called again within so many seconds.\n\n"
"It is a thread without Python that does so: for a process in which somebody holds the interpreter's lock. The time\n"
"for which the process is stopped does not count. seconds: 0 for no longer, else rounded up to quarters, 10 million at\n"
"most; message: of 255 bytes at most, what is longer is cut. Raises ValueError; RuntimeError if no thread can be\n"
"started. Local.");

static PyObject *py_watch(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seconds", "message", NULL};
    double seconds;
    const char *message;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ds", names, &seconds, &message))
        return NULL;
    if (!(seconds >= 0 && seconds <= 1e7)) {
        PyErr_SetString(PyExc_ValueError, "seconds must be from 0 to 10 million");
        return NULL;
    }
    if (watch((int)ceil(seconds * WATCH_TICKS_PER_SECOND), message) < 0) {
        PyErr_SetString(PyExc_RuntimeError, "no thread can be started");
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(running_s_doc,
"running_s()\n--\n\n"
"Seconds that this process has run since the first call, without those for which it was stopped; in quarters.\n\n"
"Raises RuntimeError if no thread can be started. Local.");

static PyObject *py_running_s(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    long long ticks = ticks_until_now();
    if (ticks < 0) {
        PyErr_SetString(PyExc_RuntimeError, "no thread can be started");
        return NULL;
    }
    return PyFloat_FromDouble((double)ticks / WATCH_TICKS_PER_SECOND);
}

PyDoc_STRVAR(guard_exit_doc,
"guard_exit(on)\n--\n\n"
"While on, an exit of this process from within C is an error: its stack is printed, and the exit code is 1.\n\n"
"The stack is printed if faulthandler.register(signal.SIGRTMAX) was called. Raises RuntimeError if no function can be\n"
"registered for the end of the process. Local.");

static PyObject *py_guard_exit(PyObject *Py_UNUSED(module), PyObject *on)
{
    int truth = PyObject_IsTrue(on);
    if (truth < 0)
        return NULL;
    if (guard_exit(truth) < 0) {
        PyErr_SetString(PyExc_RuntimeError, "no function can be registered for the end of the process");
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(handler_of_doc,
"handler_of(signal)\n--\n\n"
"The address of the function that handles a signal, in C; 0 if there is none. Local.");

static PyObject *py_handler_of(PyObject *Py_UNUSED(module), PyObject *number)
{
    long signal = PyLong_AsLong(number);
    if (signal == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong((unsigned long long)handler_of((int)signal));
}

static PyObject *with_signal(PyObject *number, int (*act)(int))
{
    long signal = PyLong_AsLong(number);
    if (signal == -1 && PyErr_Occurred())
        return NULL;
    if (act((int)signal) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(keep_handler_doc,
"keep_handler(signal)\n--\n\n"
"Note what a signal does now, in C, for `restore_handler`. Raises OSError if there is no such signal. Local.");

static PyObject *py_keep_handler(PyObject *Py_UNUSED(module), PyObject *number)
{
    return with_signal(number, keep_handler);
}

PyDoc_STRVAR(restore_handler_doc,
"restore_handler(signal)\n--\n\n"
"Let a signal do what it did at `keep_handler`. Raises OSError if there is no such signal. Local.");

static PyObject *py_restore_handler(PyObject *Py_UNUSED(module), PyObject *number)
{
    return with_signal(number, restore_handler);
}

PyDoc_STRVAR(end_within_doc,
"end_within(seconds)\n--\n\n"
"End the process by SIGALRM unless it has ended by then, whatever its threads wait in. Local.");

static PyObject *py_end_within(PyObject *Py_UNUSED(module), PyObject *seconds)
{
    unsigned long limit = PyLong_AsUnsignedLong(seconds);
    if (PyErr_Occurred())
        return NULL;
    end_within((unsigned)limit);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))py_pack, METH_VARARGS | METH_KEYWORDS, pack_doc},
    {"mix", (PyCFunction)(void (*)(void))py_mix, METH_VARARGS | METH_KEYWORDS, mix_doc},
    {"exchange", (PyCFunction)(void (*)(void))py_exchange, METH_VARARGS | METH_KEYWORDS, exchange_doc},
    {"all_finite", (PyCFunction)(void (*)(void))py_all_finite, METH_VARARGS | METH_KEYWORDS, all_finite_doc},
    {"average", (PyCFunction)(void (*)(void))py_average, METH_VARARGS | METH_KEYWORDS, average_doc},
    {"checksum", py_checksum, METH_O, checksum_doc},
    {"scale_frames", (PyCFunction)(void (*)(void))py_scale_frames, METH_VARARGS | METH_KEYWORDS, scale_frames_doc},
    {"rmsprop", (PyCFunction)(void (*)(void))py_rmsprop, METH_VARARGS | METH_KEYWORDS, rmsprop_doc},
    {"swap", (PyCFunction)(void (*)(void))py_swap, METH_VARARGS | METH_KEYWORDS, swap_doc},
    {"load", py_load, METH_O, load_doc},
    {"sketch", (PyCFunction)(void (*)(void))py_sketch, METH_VARARGS | METH_KEYWORDS, sketch_doc},
    {"watch", (PyCFunction)(void (*)(void))py_watch, METH_VARARGS | METH_KEYWORDS, watch_doc},
    {"running_s", py_running_s, METH_NOARGS, running_s_doc},
    {"guard_exit", py_guard_exit, METH_O, guard_exit_doc},
    {"handler_of", py_handler_of, METH_O, handler_of_doc},
    {"keep_handler", py_keep_handler, METH_O, keep_handler_doc},
    {"restore_handler", py_restore_handler, METH_O, restore_handler_doc},
    {"end_within", py_end_within, METH_O, end_within_doc},
    {NULL, NULL, 0, NULL},
};

static int add_itemsizes(PyObject *module)
{
    PyObject *sizes = PyDict_New();
    int failed = sizes == NULL;
    for (int i = 0; !failed && i < WIRE_COUNT; i++) {
        PyObject *size = PyLong_FromSize_t(wire_itemsize[i]);
        failed = size == NULL || PyDict_SetItemString(sizes, wire_names[i], size) < 0;
        Py_XDECREF(size);
    }
    failed = failed || PyModule_AddObjectRef(module, "WIRE_ITEMSIZE", sizes) < 0;
    Py_XDECREF(sizes);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_itemsizes},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gala_mpi._native",
    .m_doc = "Kernels over flat parameters: pack, mix, exchange, all_finite, average, checksum, sketch and rmsprop; and\n"
             "scale_frames. Atomics on a word that processes share: swap and load. A watch over the interpreter's lock,\n"
             "exits from within C, and signals' handlers.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
