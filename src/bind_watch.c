/* The Python binding of watch.h. */
#include <math.h>

#include "module.h"
#include "watch.h"

PyDoc_STRVAR(watch_doc,
"watch(seconds, message, exit_code=-1)\n--\n\n"
"End the process, after the message on stderr, unless called again within so many seconds.\n\n"
"It ends with the exit code, from 0 to 255, at once; or by SIGABRT, whose handler may print stacks, if that is -1.\n"
"It is a thread without Python that does so: for a process in which somebody holds the interpreter's lock. The time\n"
"for which the process is stopped does not count. seconds: 0 for no longer, else rounded up to quarters, 10 million at\n"
"most; message: of 255 bytes at most, what is longer is cut. Raises ValueError; RuntimeError if no thread can be\n"
"started. Local.");

static PyObject *py_watch(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seconds", "message", "exit_code", NULL};
    double seconds;
    const char *message;
    int code = -1;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ds|i", names, &seconds, &message, &code))
        return NULL;
    if (code < -1 || code > 255) {
        PyErr_SetString(PyExc_ValueError, "exit_code must be from -1 to 255");
        return NULL;
    }
    if (!(seconds >= 0 && seconds <= 1e7)) {
        PyErr_SetString(PyExc_ValueError, "seconds must be from 0 to 10 million");
        return NULL;
    }
    if (watch((int)ceil(seconds * WATCH_TICKS_PER_SECOND), message, code) < 0) {
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
    {"watch", (PyCFunction)(void (*)(void))py_watch, METH_VARARGS | METH_KEYWORDS, watch_doc},
    {"running_s", py_running_s, METH_NOARGS, running_s_doc},
    {"guard_exit", py_guard_exit, METH_O, guard_exit_doc},
    {"handler_of", py_handler_of, METH_O, handler_of_doc},
    {"keep_handler", py_keep_handler, METH_O, keep_handler_doc},
    {"restore_handler", py_restore_handler, METH_O, restore_handler_doc},
    {"end_within", py_end_within, METH_O, end_within_doc},
    {NULL, NULL, 0, NULL},
};

int add_watch(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
