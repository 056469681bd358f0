/* The Python binding of learn.h. */
#include "arguments.h"
#include "learn.h"
#include "module.h"

PyDoc_STRVAR(scale_frames_doc,
"scale_frames(frames, out)\n--\n\n"
"out <- frames / 255, with the planes of a pixel side by side.\n\n"
"frames: C-contiguous bytes (n, planes, height, width). out: writable C-contiguous buffer (n, height, width, planes)\n"
"of float32, or of uint16 for the bits of bfloat16. Raises TypeError for a wrong type, ValueError for a wrong shape,\n"
"layout or overlap. Local.");

static PyObject *py_scale_frames(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"frames", "out", NULL};
    PyObject *frames_object, *out_object;
    struct taken *frames, *out;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &frames_object, &out_object) ||
        (frames = take(&held, frames_object, "frames", "B", READ)) == NULL ||
        (out = take_aligned(&held, out_object, "out", "fH", WRITE)) == NULL)
        return finish(&held, NULL);
    const Py_ssize_t *in_shape = frames->view.shape, *out_shape = out->view.shape;
    if (frames->view.ndim != 4 || out->view.ndim != 4 || out_shape[0] != in_shape[0] || out_shape[1] != in_shape[2] ||
        out_shape[2] != in_shape[3] || out_shape[3] != in_shape[1])
        return finish(&held, PyErr_Format(PyExc_ValueError, "out: expected the shape (n, height, width, planes) for "
                                                            "frames (n, planes, height, width)"));
    if (refuse_overlap(out, frames) < 0)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    size_t images = (size_t)in_shape[0], planes = (size_t)in_shape[1], pixels = (size_t)(in_shape[2] * in_shape[3]);
    if (out->view.itemsize == sizeof(uint16_t))
        scale_frames_bfloat16(images, planes, pixels, frames->view.buf, out->view.buf);
    else
        scale_frames(images, planes, pixels, frames->view.buf, out->view.buf);
    Py_END_ALLOW_THREADS
    return finish(&held, Py_NewRef(Py_None));
}

PyDoc_STRVAR(rmsprop_doc,
"rmsprop(data, grad, square, scale, learning_rate, alpha, epsilon)\n--\n\n"
"One step of RMSprop on `scale` times the gradient, in place.\n\n"
"data, square: writable float32 buffers (n,), the parameters and the running mean of squares; grad: float32 buffer\n"
"(n,). square <- alpha * square + (1 - alpha) * g * g, then data <- data - learning_rate * g / (sqrt(square) +\n"
"epsilon), as torch.optim.RMSprop. Raises TypeError for a wrong type, ValueError for a wrong length, layout or\n"
"overlap. Local.");

/* Take a buffer of rmsprop's, the first of which says how long all are. */
static struct taken *take_as_long(struct held *held, PyObject *object, const char *name, enum access access)
{
    struct taken *taken = take_float32(held, object, name, access);
    if (taken == NULL)
        return NULL;
    if (taken->view.len != held->first->view.len) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zd bytes, as data has, got %zd", name, held->first->view.len,
                     taken->view.len);
        return NULL;
    }
    return refuse_overlap_with_earlier(held, taken) < 0 ? NULL : taken;
}

static PyObject *py_rmsprop(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "grad", "square", "scale", "learning_rate", "alpha", "epsilon", NULL};
    PyObject *data_object, *grad_object, *square_object;
    float scale, learning_rate, epsilon;
    double alpha;
    struct taken *data, *grad, *square;
    struct held held;

    begin(&held);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOffdf", names, &data_object, &grad_object, &square_object,
                                     &scale, &learning_rate, &alpha, &epsilon) ||
        (data = take_float32(&held, data_object, "data", WRITE)) == NULL ||
        (grad = take_as_long(&held, grad_object, "grad", READ)) == NULL ||
        (square = take_as_long(&held, square_object, "square", WRITE)) == NULL)
        return finish(&held, NULL);
    Py_BEGIN_ALLOW_THREADS
    rmsprop(floats_in(data), data->view.buf, grad->view.buf, square->view.buf, scale, learning_rate, alpha, epsilon);
    Py_END_ALLOW_THREADS
    return finish(&held, Py_NewRef(Py_None));
}

static PyMethodDef methods[] = {
    {"scale_frames", (PyCFunction)(void (*)(void))py_scale_frames, METH_VARARGS | METH_KEYWORDS, scale_frames_doc},
    {"rmsprop", (PyCFunction)(void (*)(void))py_rmsprop, METH_VARARGS | METH_KEYWORDS, rmsprop_doc},
    {NULL, NULL, 0, NULL},
};

int add_learn(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
