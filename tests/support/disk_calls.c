// Preloaded (LD_PRELOAD): writes down, and fails on demand, what a process does to files below the folder $DISK_CALLS_ROOT.
//
// Log ($DISK_CALLS_LOG), a line a call, of calls that succeeded: the call, the inode, then what it needs: `create 17 PATH`, `mkdir 18 PATH`,
// `write 17 OFFSET HEX`, `truncate 17 SIZE`, `sync 17`, `rename 17 FROM<TAB>TO`, `unlink 17 PATH` (folders too), `mark TEXT`. Tests' paths hold no tabs.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_DESCRIPTORS = 1024 };
static char ours[MOST_DESCRIPTORS];  // descriptors of files and folders below the root
static int log_descriptor = -1;
static const char* root;
static long calls, fail_at, fail_error, fail_all;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void start(void) {
    root = getenv("DISK_CALLS_ROOT");
    const char* path = getenv("DISK_CALLS_LOG");
    if (path) log_descriptor = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void say(const char* format, ...) {
    if (log_descriptor < 0) return;
    char line[9000];
    va_list arguments;
    va_start(arguments, format);
    const int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    syscall(SYS_write, log_descriptor, line, (size_t)length);
}

// From the `nth` call on (1 is the next), fail that one, or all from it on, with `error`; 0 for none. Returns the calls so far.
long disk_calls_fail(long nth, long error, long all) {
    const long before = calls;
    calls = 0, fail_at = nth, fail_error = error, fail_all = all;
    return before;
}

void disk_calls_mark(const char* text) { say("mark %s\n", text); }

static int fails(void) {
    ++calls;
    if (!fail_at || (fail_all ? calls < fail_at : calls != fail_at)) return 0;
    errno = (int)fail_error;
    return 1;
}

static int below(const char* path) { return root && path && strncmp(path, root, strlen(root)) == 0; }
static int tracked(int descriptor) { return descriptor >= 0 && descriptor < MOST_DESCRIPTORS && ours[descriptor]; }

static unsigned long inode(const char* path) {
    struct stat found;
    return lstat(path, &found) ? 0 : (unsigned long)found.st_ino;
}

static unsigned long inode_of(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) ? 0 : (unsigned long)found.st_ino;
}

// The whole path of one that is relative to a descriptor of ours, in `whole`; else `path`.
static const char* resolved(int folder, const char* path, char* whole, size_t size) {
    if (folder == AT_FDCWD || path[0] == '/' || !tracked(folder)) return path;
    char link[64], name[4000];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    const ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return path;
    name[length] = 0;
    snprintf(whole, size, "%s/%s", name, path);
    return whole;
}

static int opened(int folder, const char* path, int flags, mode_t mode) {
    char whole[4096];
    path = resolved(folder, path, whole, sizeof whole);
    const int mine = below(path);
    if (mine && fails()) return -1;
    const int fresh = mine && (flags & O_CREAT) && !inode(path);
    const int descriptor = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (descriptor < 0 || descriptor >= MOST_DESCRIPTORS) return descriptor;
    ours[descriptor] = (char)mine;
    if (fresh) say("create %lu %s\n", inode_of(descriptor), path);
    else if (mine && (flags & O_TRUNC)) say("truncate %lu 0\n", inode_of(descriptor));
    return descriptor;
}

#define MODE_ARGUMENT                        \
    mode_t mode = 0;                         \
    if (flags & O_CREAT) {                   \
        va_list arguments;                   \
        va_start(arguments, flags);          \
        mode = va_arg(arguments, mode_t);    \
        va_end(arguments);                   \
    }

int open(const char* path, int flags, ...) { MODE_ARGUMENT return opened(AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { MODE_ARGUMENT return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char* path, int flags, ...) { MODE_ARGUMENT return opened(folder, path, flags, mode); }
int openat64(int folder, const char* path, int flags, ...) { MODE_ARGUMENT return opened(folder, path, flags, mode); }

int close(int descriptor) {
    if (descriptor >= 0 && descriptor < MOST_DESCRIPTORS) ours[descriptor] = 0;
    return REAL(close)(descriptor);
}

static void say_written(int descriptor, off_t at, const unsigned char* data, ssize_t size) {
    for (ssize_t start = 0; start < size; start += 2048) {
        const ssize_t part = size - start < 2048 ? size - start : 2048;
        char hex[2 * 2048 + 1];
        for (ssize_t i = 0; i < part; ++i) sprintf(hex + 2 * i, "%02x", data[start + i]);
        say("write %lu %ld %s\n", inode_of(descriptor), (long)(at + start), hex);
    }
}

ssize_t write(int descriptor, const void* data, size_t size) {
    if (!tracked(descriptor)) return REAL(write)(descriptor, data, size);
    const off_t at = lseek(descriptor, 0, SEEK_CUR);
    if (fails()) {  // as a disk that gets full in the middle of it
        say_written(descriptor, at, data, REAL(write)(descriptor, data, size / 2));
        errno = (int)fail_error;
        return -1;
    }
    const ssize_t written = REAL(write)(descriptor, data, size);
    say_written(descriptor, at, data, written);
    return written;
}

ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t at) {
    if (tracked(descriptor) && fails()) return -1;
    const ssize_t written = REAL(pwrite64)(descriptor, data, size, at);
    if (tracked(descriptor)) say_written(descriptor, at, data, written);
    return written;
}
ssize_t pwrite(int descriptor, const void* data, size_t size, off_t at) { return pwrite64(descriptor, data, size, at); }

int ftruncate64(int descriptor, off64_t size) {
    if (tracked(descriptor) && fails()) return -1;
    struct stat found;
    const int changes = tracked(descriptor) && (fstat(descriptor, &found) || found.st_size != size);
    const int result = REAL(ftruncate64)(descriptor, size);
    if (!result && changes) say("truncate %lu %ld\n", inode_of(descriptor), (long)size);
    return result;
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

int fsync(int descriptor) {
    if (!tracked(descriptor)) return REAL(fsync)(descriptor);
    if (fails()) return -1;
    say("sync %lu\n", inode_of(descriptor));  // the test's disk need not do it
    return 0;
}
int fdatasync(int descriptor) { return fsync(descriptor); }

int rename(const char* from, const char* to) {
    if (below(to) && fails()) return -1;
    const unsigned long moved = below(to) ? inode(from) : 0;
    const int result = REAL(rename)(from, to);
    if (!result && below(to)) say("rename %lu %s\t%s\n", moved, from, to);
    return result;
}

int unlink(const char* path) {
    if (below(path) && fails()) return -1;
    const unsigned long gone = below(path) ? inode(path) : 0;
    const int result = REAL(unlink)(path);
    if (!result && below(path)) say("unlink %lu %s\n", gone, path);
    return result;
}

int rmdir(const char* path) {
    if (below(path) && fails()) return -1;
    const unsigned long gone = below(path) ? inode(path) : 0;
    const int result = REAL(rmdir)(path);
    if (!result && below(path)) say("unlink %lu %s\n", gone, path);
    return result;
}

int unlinkat(int folder, const char* name, int flags) {
    char whole[4096];
    const char* path = resolved(folder, name, whole, sizeof whole);
    if (below(path) && fails()) return -1;
    const unsigned long gone = below(path) ? inode(path) : 0;
    const int result = REAL(unlinkat)(folder, name, flags);
    if (!result && below(path)) say("unlink %lu %s\n", gone, path);
    return result;
}

int mkdir(const char* path, mode_t mode) {
    if (below(path) && fails()) return -1;
    const int result = REAL(mkdir)(path, mode);
    if (!result && below(path)) say("mkdir %lu %s\n", inode(path), path);
    return result;
}
