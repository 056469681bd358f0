/* A thread that ends a process whose interpreter is locked: no thread of Python could. */
#ifndef GALA_MPI_WATCH_H
#define GALA_MPI_WATCH_H

#include <stddef.h>

enum { WATCH_TICKS_PER_SECOND = 4, WATCH_MESSAGE_BYTES = 256 };

/* End the process by SIGABRT, after `message` on stderr, unless called again within so many ticks of the thread. A tick
 * is one, however long the process was stopped in it. 0 ticks: not at all. Returns -1 if no thread can be started. To be
 * called with the interpreter's lock held. */
int watch(int ticks, const char *message);

#endif
