/* The Python module, gala_mpi._native. */
#include "module.h"

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_wire},
    {Py_mod_exec, add_checksum},
    {Py_mod_exec, add_mix},
    {Py_mod_exec, add_learn},
    {Py_mod_exec, add_words},
    {Py_mod_exec, add_watch},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gala_mpi._native",
    .m_doc = "Kernels over flat parameters: pack, mix, exchange, all_finite, average, sketch and rmsprop; and\n"
             "scale_frames. Checksums of messages, and copies that are checked as they are made. Atomics on a word that processes share: swap and load. A watch over the interpreter's lock,\n"
             "exits from within C, and signals' handlers.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
