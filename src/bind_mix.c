/* The Python binding of mix.h. */
#include <math.h>

#include "arguments.h"
#include "mix.h"
#include "module.h"

/* A number that is finite as float32 too. */
static int read_weight(PyObject *object, const char *name, double *weight)
{
    *weight = PyFloat_AsDouble(object);
    if (*weight == -1.0 && PyErr_Occurred())
        return -1;
    if (isfinite((float)*weight))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected finite numbers, got %R", name, object);
    return -1;
}

/* The messages of one mix, and what became of each. */
struct messages {
    Py_ssize_t count;
    const unsigned char **message;
    float *weights;
    int *accepted;
    double *squared;
};

static int take_messages(struct held *held, struct messages *each, PyObject *messages, PyObject *weights,
                         const struct taken *state, enum wire wire)
{
    PyObject *message_list = take_list(held, messages);
    PyObject *weight_list = message_list == NULL ? NULL : take_list(held, weights);
    if (weight_list == NULL)
        return -1;
    each->count = PyList_Size(message_list);
    if (PyList_Size(weight_list) != each->count) {
        PyErr_Format(PyExc_ValueError, "weights: expected one for each of the %zd messages, got %zd", each->count,
                     PyList_Size(weight_list));
        return -1;
    }
    size_t n = (size_t)each->count, count = floats_in(state);
    if ((each->message = reserve(held, n, sizeof *each->message)) == NULL ||
        (each->weights = reserve(held, n, sizeof *each->weights)) == NULL ||
        (each->accepted = reserve(held, n, sizeof *each->accepted)) == NULL ||
        (each->squared = reserve(held, n, sizeof *each->squared)) == NULL)
        return -1;
    for (Py_ssize_t k = 0; k < each->count; k++) {
        double weight;
        if (read_weight(PyList_GetItem(weight_list, k), "weights", &weight) < 0)
            return -1;
        struct taken *message = take_values(held, PyList_GetItem(message_list, k), "messages", wire, count, READ);
        if (message == NULL || refuse_overlap(state, message) < 0)
            return -1;
        each->message[k] = message->view.buf;
        each->weights[k] = (float)weight;
    }
    return 0;
}

static PyObject *squared_list(const struct messages *each)
{
    PyObject *list = PyList_New(each->count);
    for (Py_ssize_t k = 0; list != NULL && k < each->count; k++) {
        PyObject *number = PyFloat_FromDouble(each->squared[k]);
        /* The list takes the reference. */
        if (number == NULL || PyList_SetItem(list, k, number) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *accepted_list(const struct messages *each)
{
    PyObject *list = PyList_New(each->count);
    for (Py_ssize_t k = 0; list != NULL && k < each->count; k++) {
        if (PyList_SetItem(list, k, PyBool_FromLong(each->accepted[k])) < 0)
            Py_CLEAR(list);
    }
    return list;
}

/* A pass that writes in place cannot refuse what it finds half way: look first, then mix. */
static void check_and_mix(const struct messages *each, const struct taken *state, double self_weight, enum wire wire)
{
    size_t count = floats_in(state);
    for (Py_ssize_t k = 0; k < each->count; k++) {
        each->accepted[k] = all_finite(wire, count, each->message[k]);
        if (!each->accepted[k])
            self_weight += (double)each->weights[k];
    }
    mix(wire, count, state->view.buf, (float)self_weight, (size_t)each->count, each->message, each->weights,
        each->accepted, each->squared);
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
    PyObject *state_object, *self_object, *messages, *weights;
    const char *wire_name = "float32";
    enum wire wire;
    double self_weight;
    struct taken *state;
    struct messages each;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|s", names, &state_object, &self_object, &messages, &weights,
                                     &wire_name) ||
        find_wire(wire_name, &wire) < 0 || read_weight(self_object, "self_weight", &self_weight) < 0 ||
        (state = take_float32(&held, state_object, "state", WRITE)) == NULL ||
        take_messages(&held, &each, messages, weights, state, wire) < 0)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    check_and_mix(&each, state, self_weight, wire);
    Py_END_ALLOW_THREADS
    PyObject *squared = squared_list(&each), *accepted = accepted_list(&each);
    PyObject *result = squared == NULL || accepted == NULL ? NULL : PyTuple_Pack(2, squared, accepted);
    Py_XDECREF(squared);
    Py_XDECREF(accepted);
    return finish(&held, result);
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
    PyObject *state_object, *copies, *self_object, *messages, *weights, *list;
    double self_weight;
    struct taken *state;
    struct messages each;
    unsigned char **copy;
    int finite;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO", names, &state_object, &copies, &self_object, &messages,
                                     &weights) ||
        read_weight(self_object, "self_weight", &self_weight) < 0 ||
        (state = take_float32(&held, state_object, "state", WRITE)) == NULL ||
        take_messages(&held, &each, messages, weights, state, WIRE_FLOAT32) < 0 ||
        (list = take_list(&held, copies)) == NULL)
        return finish(&held, NULL);
    size_t count = floats_in(state);
    Py_ssize_t wanted = PyList_Size(list);
    if (wanted == 0)
        return finish(&held, PyErr_Format(PyExc_ValueError, "copies: expected one at least"));
    if ((copy = reserve(&held, (size_t)wanted, sizeof *copy)) == NULL)
        return finish(&held, NULL);
    for (Py_ssize_t i = 0; i < wanted; i++) {
        struct taken *one = take_values(&held, PyList_GetItem(list, i), "copies", WIRE_FLOAT32, count, WRITE);
        if (one == NULL || refuse_overlap_with_earlier(&held, one) < 0)
            return finish(&held, NULL);
        copy[i] = one->view.buf;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t k = 0; k < each.count; k++)
        each.accepted[k] = 1;
    finite = exchange(count, state->view.buf, (size_t)wanted, copy, self_weight, (size_t)each.count, each.message,
                      each.weights, each.accepted, each.squared);
    Py_END_ALLOW_THREADS
    return finish(&held, Py_BuildValue("NNN", PyBool_FromLong(finite), squared_list(&each), accepted_list(&each)));
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
    PyObject *state_object, *message_object;
    struct taken *state, *message;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &state_object, &message_object) ||
        (state = take_float32(&held, state_object, "state", WRITE)) == NULL ||
        (message = take_values(&held, message_object, "message", WIRE_FLOAT32, floats_in(state), READ)) == NULL ||
        refuse_overlap(state, message) < 0)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    average(floats_in(state), state->view.buf, message->view.buf);
    Py_END_ALLOW_THREADS
    return finish(&held, Py_NewRef(Py_None));
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
    PyObject *state_object, *out_object, *seed_object;
    struct taken *state, *out;
    double *sums, squared;
    struct held held;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &state_object, &out_object, &seed_object))
        return NULL;
    uint64_t seed = PyLong_AsUnsignedLongLong(seed_object);
    if (PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_SetString(PyExc_ValueError, "seed: expected an integer from 0 to 2**64 - 1");
        return NULL;
    }
    begin(&held);
    if ((state = take_float32(&held, state_object, "state", READ)) == NULL ||
        (out = take_float32(&held, out_object, "out", WRITE)) == NULL)
        return finish(&held, NULL);
    size_t buckets = floats_in(out);
    if (buckets < 2 || (buckets & (buckets - 1)) != 0)
        return finish(&held, PyErr_Format(PyExc_ValueError,
                                          "out: expected a power of two of values, at least 2, got %zu", buckets));
    if (refuse_overlap(out, state) < 0 || (sums = reserve(&held, buckets, sizeof *sums)) == NULL)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    squared = sketch(floats_in(state), state->view.buf, seed, buckets, sums);
    for (size_t i = 0; i < buckets; i++)
        ((float *)out->view.buf)[i] = (float)sums[i];
    Py_END_ALLOW_THREADS
    return finish(&held, PyFloat_FromDouble(squared));
}

static PyMethodDef methods[] = {
    {"mix", (PyCFunction)(void (*)(void))py_mix, METH_VARARGS | METH_KEYWORDS, mix_doc},
    {"exchange", (PyCFunction)(void (*)(void))py_exchange, METH_VARARGS | METH_KEYWORDS, exchange_doc},
    {"average", (PyCFunction)(void (*)(void))py_average, METH_VARARGS | METH_KEYWORDS, average_doc},
    {"sketch", (PyCFunction)(void (*)(void))py_sketch, METH_VARARGS | METH_KEYWORDS, sketch_doc},
    {NULL, NULL, 0, NULL},
};

int add_mix(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
