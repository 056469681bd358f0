#define _POSIX_C_SOURCE 200809L

#include "watch.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* The thread alone writes it. */
static atomic_llong counted;
/* Ticks that are left. The caller sets it, the thread counts it down, unless a call has come in between. */
static atomic_int left;
/* What the process ends with; negative: by SIGABRT. As `said`. */
static int exit_code = -1;
/* Written by callers only, which hold the interpreter's lock; read when the last of them has let its time pass. */
static char said[WATCH_MESSAGE_BYTES];

uintptr_t handler_of(int signal)
{
    struct sigaction now;
    if (sigaction(signal, NULL, &now) < 0)
        return 0;
    return (now.sa_flags & SA_SIGINFO) ? (uintptr_t)now.sa_sigaction : (uintptr_t)now.sa_handler;
}

/* Standard signals alone: the numbers of real-time ones are no constants. */
enum { SIGNALS = 32 };
static struct sigaction kept[SIGNALS];

int keep_handler(int signal)
{
    if (signal < 1 || signal >= SIGNALS)
        return -1;
    return sigaction(signal, NULL, &kept[signal]);
}

int restore_handler(int signal)
{
    if (signal < 1 || signal >= SIGNALS)
        return -1;
    return sigaction(signal, &kept[signal], NULL);
}

void end_within(unsigned seconds)
{
    /* The kernel ends the process, whatever its threads are waiting in. */
    signal(SIGALRM, SIG_DFL);
    sigset_t alarms;
    sigemptyset(&alarms);
    sigaddset(&alarms, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
    alarm(seconds);
}

/* Whether an exit is one that nobody has asked for: set and read by the main thread. */
static volatile sig_atomic_t guarded;
static pid_t guarded_in;

static void exit_in_order(void)
{
    static const char text[] = "error: code of the user's, or a library of it, has ended the program from within C:\n";
    if (!guarded || guarded_in != getpid())
        return;
    end_within(WATCH_SPEAK_SECONDS);
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0) {
        /* There is nobody to tell. */
    }
    /* A handler prints the stack, and returns; without one the process would end by the signal. */
    if (handler_of(GUARD_SIGNAL))
        raise(GUARD_SIGNAL);
    _exit(1);
}

int guard_exit(int on)
{
    static int registered;
    if (on && !registered) {
        if (atexit(exit_in_order) != 0)
            return -1;
        registered = 1;
    }
    if (on)
        guarded_in = getpid();
    guarded = on;
    return 0;
}

static void end(void)
{
    /* A core of all that a policy and its simulators take would fill a disk. */
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    end_within(WATCH_SPEAK_SECONDS);
    if (write(STDERR_FILENO, said, strlen(said)) < 0) {
        /* There is nobody to tell. */
    }
    if (exit_code >= 0)
        _exit(exit_code);
    abort();
}

static void *count_down(void *unused)
{
    (void)unused;
    const struct timespec tick = {0, 1000000000 / WATCH_TICKS_PER_SECOND};
    for (;;) {
        nanosleep(&tick, NULL);
        atomic_fetch_add(&counted, 1);
        int now = atomic_load(&left);
        if (now > 0 && atomic_compare_exchange_strong(&left, &now, now - 1) && now == 1)
            end();
    }
    return NULL;
}

static int start(void)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    /* Signals are for the main thread. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, NULL, count_down, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed)
        pthread_detach(thread);
    return failed ? -1 : 0;
}

/* Start the thread, if this process has none yet: a child of fork has not. */
static int start_once(void)
{
    static pid_t started_in;
    if (started_in != getpid()) {
        if (start() < 0)
            return -1;
        started_in = getpid();
    }
    return 0;
}

long long ticks_until_now(void)
{
    return start_once() < 0 ? -1 : atomic_load(&counted);
}

int watch(int ticks, const char *message, int code)
{
    if (start_once() < 0)
        return -1;
    /* Not while the thread might read it. */
    atomic_store(&left, 0);
    strncpy(said, message, sizeof said - 1);
    exit_code = code;
    atomic_store(&left, ticks);
    return 0;
}
