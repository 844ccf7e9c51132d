/* A disk that cannot be written to, for what is run with this library preloaded.

   FULL_DISK is a folder, FULL_ERRNO what the system says there: ENOSPC and EDQUOT refuse content and
   folders, EROFS every change. With FULL_WHILE, a file's name, only for as long as that is there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int refused(int at, const char *path) {
  const char *disk = getenv("FULL_DISK"), *code = getenv("FULL_ERRNO"), *until = getenv("FULL_WHILE");
  char whole[PATH_MAX], link[64];
  if (!disk || !code || (until && access(until, F_OK))) return 0;
  if (!path || path[0] != '/') { /* a descriptor, or relative to one */
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    if (length < 0) return 0;
    whole[length] = 0;
    path = whole;
  }
  size_t length = strlen(disk);
  if (strncmp(path, disk, length) || (path[length] && path[length] != '/')) return 0;
  return atoi(code);
}

#define CONTENT(at, path) { int code = refused(at, path); if (code) { errno = code; return -1; } }
#define CHANGE(at, path) { if (refused(at, path) == EROFS) { errno = EROFS; return -1; } }

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (writes(flags)) CHANGE(AT_FDCWD, path) \
    REAL(name); return real(path, flags, mode); \
  }
#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (writes(flags)) CHANGE(at, path) \
    REAL(name); return real(at, path, flags, mode); \
  }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *from, size_t n) { CONTENT(fd, NULL) REAL(write); return real(fd, from, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { CONTENT(fd, NULL) REAL(writev); return real(fd, v, n); }
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
  CONTENT(fd, NULL) REAL(pwrite64); return real(fd, from, n, at);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) {
  extern ssize_t sendfile64(int, int, off64_t *, size_t);
  CONTENT(to, NULL) REAL(sendfile64); return real(to, from, at, n);
}
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags) {
  CONTENT(to, NULL) REAL(copy_file_range); return real(from, a, to, b, n, flags);
}
int ftruncate64(int fd, off64_t n) { CHANGE(fd, NULL) REAL(ftruncate64); return real(fd, n); }
int mkdir(const char *path, mode_t mode) { CONTENT(AT_FDCWD, path) REAL(mkdir); return real(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { CONTENT(at, path) REAL(mkdirat); return real(at, path, mode); }
int rename(const char *old, const char *new) { CHANGE(AT_FDCWD, new) REAL(rename); return real(old, new); }
int unlink(const char *path) { CHANGE(AT_FDCWD, path) REAL(unlink); return real(path); }
int unlinkat(int at, const char *path, int flags) { CHANGE(at, path) REAL(unlinkat); return real(at, path, flags); }
int rmdir(const char *path) { CHANGE(AT_FDCWD, path) REAL(rmdir); return real(path); }
