/* Atomics on words that processes share, for Python. */
#include <stdatomic.h>
#include <stdint.h>

#include "arguments.h"
#include "module.h"

/* Their atomics must be the processor's own, not a lock inside one process. */
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(_Atomic long long) == sizeof(int64_t),
               "64-bit atomics are not lock-free here");

static _Atomic long long *take_word(struct held *held, PyObject *object, enum access access)
{
    struct taken *word = take(held, object, "word", "Blq", access);
    if (word == NULL)
        return NULL;
    if (word->view.len == sizeof(int64_t) && (uintptr_t)word->view.buf % sizeof(int64_t) == 0)
        return word->view.buf;
    PyErr_Format(PyExc_ValueError, "word: expected 8 bytes at a multiple of 8, got %zd", word->view.len);
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
    _Atomic long long *word;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL", names, &object, &value) ||
        (word = take_word(&held, object, WRITE)) == NULL)
        return finish(&held, NULL);
    return finish(&held, PyLong_FromLongLong(atomic_exchange(word, value)));
}

PyDoc_STRVAR(load_doc,
"load(word)\n--\n\n"
"Atomically read a 64-bit integer in memory that processes share; see `swap`.\n\n"
"word: buffer of 8 bytes, at a multiple of 8. Raises TypeError or ValueError. Local.");

static PyObject *py_load(PyObject *Py_UNUSED(module), PyObject *object)
{
    struct held held;

    begin(&held);
    _Atomic long long *word = take_word(&held, object, READ);
    return finish(&held, word == NULL ? NULL : PyLong_FromLongLong(atomic_load(word)));
}

static PyMethodDef methods[] = {
    {"swap", (PyCFunction)(void (*)(void))py_swap, METH_VARARGS | METH_KEYWORDS, swap_doc},
    {"load", py_load, METH_O, load_doc},
    {NULL, NULL, 0, NULL},
};

int add_words(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
