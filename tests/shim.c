// Makes chosen calls fail or wait: gcc -shared -fPIC -o shim.so shim.c -ldl, then LD_PRELOAD it.
//
// FAULT is read at every call, so that a test may set and clear it as it goes:
//   OPERATION ERRNO PATTERN AFTER TIMES DELAY_MS [anything: a changed text counts from 0 again]
// Of the calls of OPERATION (write, read, fsync, rename, flock) on paths that fit PATTERN (as in
// fnmatch), the first AFTER pass, the next TIMES wait and then fail with ERRNO (0: only wait).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fnmatch.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char counted[512];
static int num_calls;

static int fails(const char *operation, int fd, const char *path) {
    const char *fault = getenv("FAULT");
    char wanted[16], pattern[256], link[32], target[4096] = "";
    int error, after, times, delay_ms, before = errno;
    if (!fault || sscanf(fault, "%15s %d %255s %d %d %d", wanted, &error, pattern, &after, &times,
                         &delay_ms) != 6 || strcmp(wanted, operation))
        return 0;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        path = readlink(link, target, sizeof target - 1) < 0 ? "" : target;
        errno = before;
    }
    if (fnmatch(pattern, path, 0))
        return 0;
    pthread_mutex_lock(&mutex);
    if (strcmp(counted, fault))
        num_calls = 0;
    snprintf(counted, sizeof counted, "%s", fault);
    int number = num_calls++;
    pthread_mutex_unlock(&mutex);
    if (number < after || number >= after + times)
        return 0;
    usleep(1000 * delay_ms);
    errno = error ? error : before;
    return error != 0;
}

#define SHIM(operation, type, name, parameters, arguments, fd, path)                 \
    type name parameters {                                                           \
        type (*real) parameters = (type (*) parameters)dlsym(RTLD_NEXT, #name);      \
        return fails(operation, fd, path) ? -1 : real arguments;                     \
    }

SHIM("write", ssize_t, write, (int fd, const void *p, size_t n), (fd, p, n), fd, 0)
SHIM("write", ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), fd, 0)
SHIM("write", ssize_t, pwrite64, (int fd, const void *p, size_t n, off_t at), (fd, p, n, at), fd, 0)
SHIM("read", ssize_t, read, (int fd, void *p, size_t n), (fd, p, n), fd, 0)
SHIM("read", ssize_t, pread, (int fd, void *p, size_t n, off_t at), (fd, p, n, at), fd, 0)
SHIM("read", ssize_t, pread64, (int fd, void *p, size_t n, off_t at), (fd, p, n, at), fd, 0)
SHIM("fsync", int, fsync, (int fd), (fd), fd, 0)
SHIM("fsync", int, fdatasync, (int fd), (fd), fd, 0)
SHIM("rename", int, rename, (const char *from, const char *to), (from, to), -1, from)
SHIM("rename", int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), -1, from)
SHIM("flock", int, flock, (int fd, int operation), (fd, operation), fd, 0)
