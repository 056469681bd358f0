/* The Python binding of checksum.h. */
#include "arguments.h"
#include "checksum.h"
#include "module.h"

/* A converter for PyArg_Parse*: 1 if the object is an integer of 64 bits, else 0 with Python's error set. */
static int take_seed(PyObject *object, void *seed)
{
    *(uint64_t *)seed = PyLong_AsUnsignedLongLong(object);
    return !PyErr_Occurred();
}

PyDoc_STRVAR(checksum_doc,
"checksum(buffer, seed=0)\n--\n\n"
"A number of 64 bits that differs, but for a chance of about 2**-64, if any byte of a buffer does.\n\n"
"buffer: contiguous bytes at any address. seed: any unsigned integer of 64 bits, which is taken in as well. Raises\n"
"TypeError, ValueError or OverflowError. Local.");

static PyObject *py_checksum(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "seed", NULL};
    PyObject *object;
    struct taken *buffer;
    uint64_t seed = 0, sum;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O&", names, &object, take_seed, &seed) ||
        (buffer = take(&held, object, "buffer", "B", READ)) == NULL)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    sum = checksum((size_t)buffer->view.len, buffer->view.buf, seed);
    Py_END_ALLOW_THREADS
    return finish(&held, PyLong_FromUnsignedLongLong(sum));
}

PyDoc_STRVAR(checked_copy_doc,
"checked_copy(source, out, seed=0)\n--\n\n"
"Copy bytes, and return checksum(out, seed): of what was copied, though others may write to the source meanwhile.\n\n"
"source, out: contiguous bytes at any address, of one length. Raises TypeError for a wrong type, ValueError for a wrong\n"
"length, layout or overlap, OverflowError for a wrong seed. Local.");

static PyObject *py_checked_copy(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"source", "out", "seed", NULL};
    PyObject *source_object, *out_object;
    struct taken *source, *out;
    uint64_t seed = 0, sum;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O&", names, &source_object, &out_object, take_seed, &seed) ||
        (source = take(&held, source_object, "source", "B", READ)) == NULL ||
        (out = take(&held, out_object, "out", "B", WRITE)) == NULL ||
        refuse_overlap_with_earlier(&held, out) < 0)
        return finish(&held, NULL);
    if (source->view.len != out->view.len)
        return finish(&held, PyErr_Format(PyExc_ValueError, "out: expected %zd bytes, got %zd", source->view.len,
                                          out->view.len));
    Py_BEGIN_ALLOW_THREADS
    sum = checked_copy((size_t)source->view.len, source->view.buf, out->view.buf, seed);
    Py_END_ALLOW_THREADS
    return finish(&held, PyLong_FromUnsignedLongLong(sum));
}

static PyMethodDef methods[] = {
    {"checksum", (PyCFunction)(void (*)(void))py_checksum, METH_VARARGS | METH_KEYWORDS, checksum_doc},
    {"checked_copy", (PyCFunction)(void (*)(void))py_checked_copy, METH_VARARGS | METH_KEYWORDS, checked_copy_doc},
    {NULL, NULL, 0, NULL},
};

int add_checksum(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
