/* What the interpreter cannot see: the time that the process has, and the end of one whose interpreter is locked (by a thread
 * without Python); an exit from within C; a handler that a library has put in place of another. */
#ifndef GALA_MPI_WATCH_H
#define GALA_MPI_WATCH_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>

enum { WATCH_TICKS_PER_SECOND = 4, WATCH_MESSAGE_BYTES = 256, WATCH_SPEAK_SECONDS = 10 };

/* Ticks since the first call; one is one, however long the process was stopped in it. -1 if no thread can be started. Both
 * are to be called with the interpreter's lock held. */
long long ticks_until_now(void);

/* End the process, after `message` on stderr, unless called again within so many ticks: with exit code `code`, or by SIGABRT
 * if that is negative. 0 ticks: not at all. Returns -1 if no thread can be started. */
int watch(int ticks, const char *message, int code);

/* While on, an exit of this process from within C is GUARD_SIGNAL, if that has a handler, then exit code 1. -1 if that cannot
 * be had. */
#define GUARD_SIGNAL SIGRTMAX
int guard_exit(int on);

/* End the process by SIGALRM unless it has ended by then: before words that nobody may read, in a pipe that is full. */
void end_within(unsigned seconds);

/* Note what a signal does now, and make it do that again. -1 if there is no such signal. */
int keep_handler(int signal);
int restore_handler(int signal);

/* The address of the handler of a signal, 0 if there is none. */
uintptr_t handler_of(int signal);

#endif
