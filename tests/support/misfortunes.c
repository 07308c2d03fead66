// Preloaded into a server: a full disk, and a clock that jumps.
//
// FULL_FLAG: while that file exists, nothing can be created or written below FULL_FOLDER (ENOSPC).
// CLOCK_FILE: a file of one int64, seconds that are added to the time of day.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_full(const char* path) {
    const char *flag = getenv("FULL_FLAG"), *folder = getenv("FULL_FOLDER");
    return flag && folder && path && !strncmp(path, folder, strlen(folder)) && access(flag, F_OK) == 0;
}

static int is_full_below(int at, const char* name) {
    char path[PATH_MAX], link[64];
    if (name && name[0] == '/') return is_full(name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_full(path);
}

#define OPENS(name)                                                                    \
    int name(const char* path, int flags, ...) {                                       \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;        \
        va_end(rest);                                                                  \
        if (flags & O_CREAT && is_full(path)) return errno = ENOSPC, -1;               \
        return NEXT(name)(path, flags, mode);                                          \
    }
OPENS(open)
OPENS(open64)

int openat(int at, const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (flags & O_CREAT && is_full_below(at, path)) return errno = ENOSPC, -1;
    return NEXT(openat)(at, path, flags, mode);
}

ssize_t write(int fd, const void* data, size_t size) {
    if (getenv("FULL_FLAG") && is_full_below(fd, NULL)) return errno = ENOSPC, -1;
    return NEXT(write)(fd, data, size);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
    if (getenv("FULL_FLAG") && is_full_below(fd, NULL)) return errno = ENOSPC, -1;
    return NEXT(pwrite64)(fd, data, size, at);
}

static int64_t shift(void) {
    static volatile int64_t* shared;
    const char* path = getenv("CLOCK_FILE");
    if (!shared && path) {
        int fd = NEXT(open)(path, O_RDONLY);
        void* map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *shared, PROT_READ, MAP_SHARED, fd, 0);
        if (fd >= 0) close(fd);
        if (map != MAP_FAILED) shared = map;
    }
    return shared ? *shared : 0;
}

int clock_gettime(clockid_t clock, struct timespec* now) {
    int failed = NEXT(clock_gettime)(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval* restrict now, void* restrict zone) {
    int failed = NEXT(gettimeofday)(now, zone);
    if (!failed) now->tv_sec += shift();
    return failed;
}

time_t time(time_t* out) {
    time_t now = NEXT(time)(NULL) + shift();
    if (out) *out = now;
    return now;
}
