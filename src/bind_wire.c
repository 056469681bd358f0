/* The Python binding of wire.h. */
#include "arguments.h"
#include "module.h"
#include "wire.h"

PyDoc_STRVAR(pack_doc,
"pack(sources, out, wire='float32')\n--\n\n"
"Gather float32 buffers, in order, into one buffer of the wire type.\n\n"
"sources: sequence of C-contiguous float32 buffers of any shape. out: writable buffer of bytes, or of the wire\n"
"type, that holds exactly as many values. Rounds to nearest even. Raises TypeError for a wrong type, ValueError\n"
"for a wrong length, layout or overlap. Local.");

static PyObject *py_pack(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sources", "out", "wire", NULL};
    PyObject *sources, *out_object, *list;
    const char *wire_name = "float32";
    enum wire wire;
    struct taken *out;
    size_t count = 0;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|s", names, &sources, &out_object, &wire_name) ||
        find_wire(wire_name, &wire) < 0 || (list = take_list(&held, sources)) == NULL)
        return finish(&held, NULL);
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        struct taken *source = take_float32(&held, PyList_GetItem(list, i), "sources", READ);
        if (source == NULL)
            return finish(&held, NULL);
        count += floats_in(source);
    }
    if ((out = take_values(&held, out_object, "out", wire, count, WRITE)) == NULL ||
        refuse_overlap_with_earlier(&held, out) < 0)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    unsigned char *place = out->view.buf;
    for (const struct taken *source = held.first; source != out; source = source->next) {
        pack(wire, floats_in(source), source->view.buf, place);
        place += floats_in(source) * wire_itemsize[wire];
    }
    Py_END_ALLOW_THREADS
    return finish(&held, Py_NewRef(Py_None));
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
    struct taken *buffer;
    int finite;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s", names, &buffer_object, &wire_name) ||
        find_wire(wire_name, &wire) < 0 ||
        (buffer = take_wire(&held, buffer_object, "buffer", wire, READ)) == NULL)
        return finish(&held, NULL);
    size_t nbytes = (size_t)buffer->view.len;
    if (nbytes % wire_itemsize[wire] != 0)
        return finish(&held, PyErr_Format(PyExc_ValueError,
                                          "buffer: expected whole values of %s (%zu bytes each), got %zu bytes",
                                          wire_name, wire_itemsize[wire], nbytes));
    Py_BEGIN_ALLOW_THREADS
    finite = all_finite(wire, nbytes / wire_itemsize[wire], buffer->view.buf);
    Py_END_ALLOW_THREADS
    return finish(&held, PyBool_FromLong(finite));
}

static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))py_pack, METH_VARARGS | METH_KEYWORDS, pack_doc},
    {"all_finite", (PyCFunction)(void (*)(void))py_all_finite, METH_VARARGS | METH_KEYWORDS, all_finite_doc},
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

int add_wire(PyObject *module)
{
    return PyModule_AddFunctions(module, methods) < 0 || add_itemsizes(module) < 0 ? -1 : 0;
}
