/* A thread without Python: it counts the time that the process has, and ends one whose interpreter is locked. */
#ifndef GALA_MPI_WATCH_H
#define GALA_MPI_WATCH_H

#include <stddef.h>

enum { WATCH_TICKS_PER_SECOND = 4, WATCH_MESSAGE_BYTES = 256 };

/* Ticks since the first call; one is one, however long the process was stopped in it. -1 if no thread can be started. Both
 * are to be called with the interpreter's lock held. */
long long ticks_until_now(void);

/* End the process by SIGABRT, after `message` on stderr, unless called again within so many ticks. 0: not at all. Returns
 * -1 if no thread can be started. */
int watch(int ticks, const char *message);

#endif
