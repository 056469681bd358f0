/* The parts of the Python module. Each `bind_*.c` adds its functions; -1 with Python's error set. */
#ifndef GALA_MPI_MODULE_H
#define GALA_MPI_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

int add_wire(PyObject *module);
int add_checksum(PyObject *module);
int add_mix(PyObject *module);
int add_learn(PyObject *module);
int add_words(PyObject *module);
int add_watch(PyObject *module);

#endif
