/*
 * A disk that fails on command: preloaded into a daemon (LD_PRELOAD), it refuses chosen calls on chosen paths.
 *
 * The file named by FAILING_DISK is mapped by the test, which writes rules, and by every process of the daemon, which
 * read them. Each rule is 256 bytes: operations (bits, 0 = unused), errno, calls that still pass, calls that still fail
 * (-1: all), calls refused so far, and a piece that the path must contain. A rule with the bit SHORT makes half of a
 * write instead of refusing it. What passes goes to the real call, so O_DIRECT and real file systems stay what they are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, SYNCFS = 4, ALLOCATE = 8, OPEN = 16, RENAME = 32, UNLINK = 64, MKDIR = 128, CUT = 256,
       READ = 512, SHORT = 1024 };

struct rule {
  volatile int operations, error, pass, fail, refused;
  char path[256 - 5 * sizeof(int)];
};
enum { RULES = 16 };

static struct rule *rules;

__attribute__((constructor)) static void begin(void) {
  const char *name = getenv("FAILING_DISK");
  int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *found = mmap(NULL, RULES * sizeof(struct rule), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (found != MAP_FAILED) rules = found;
  close(fd);
}

/* The rule that refuses this call, or NULL. */
static struct rule *refuses(int operation, const char *path) {
  for (int i = 0; rules && i < RULES; i++) {
    struct rule *rule = &rules[i];
    if (!(rule->operations & operation) || !strstr(path, rule->path)) continue;
    if (rule->pass > 0) { __sync_fetch_and_sub(&rule->pass, 1); continue; }
    if (rule->fail == 0) continue;
    if (rule->fail > 0) __sync_fetch_and_sub(&rule->fail, 1);
    __sync_fetch_and_add(&rule->refused, 1);
    return rule;
  }
  return NULL;
}

static struct rule *refuses_fd(int operation, int fd) {
  char link[64], path[PATH_MAX];
  int any = 0;
  for (int i = 0; rules && i < RULES; i++) any |= rules[i].operations & operation;
  if (!any) return NULL;
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (length < 0) return NULL;
  path[length] = 0;
  return refuses(operation, path);
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })
#define REFUSE(found) do { struct rule *r = (found); if (r) { errno = r->error; return -1; } } while (0)

/* Half of the bytes, cut to whole blocks as a device would. */
static size_t half(size_t count) { return count > 4096 ? count / 2 / 4096 * 4096 : count / 2; }

#define PLAIN_WRITE(name, ...) \
  REFUSE(refuses_fd(WRITE, fd)); \
  if (refuses_fd(SHORT, fd)) return REAL(name)(fd, buffer, half(count), ##__VA_ARGS__); \
  return REAL(name)(fd, buffer, count, ##__VA_ARGS__)

ssize_t write(int fd, const void *buffer, size_t count) { PLAIN_WRITE(write); }
ssize_t pwrite(int fd, const void *buffer, size_t count, off_t at) { PLAIN_WRITE(pwrite, at); }
ssize_t pwrite64(int fd, const void *buffer, size_t count, off64_t at) { PLAIN_WRITE(pwrite64, at); }

/* The first buffers only, so that something is missing; of a single one, half. */
static ssize_t short_vector(int fd, const struct iovec *vector, int count, off64_t at) {
  struct iovec one = vector[0];
  if (count > 1) return REAL(pwritev64)(fd, vector, count / 2, at);
  one.iov_len = half(one.iov_len);
  return REAL(pwritev64)(fd, &one, 1, at);
}

#define VECTOR_WRITE(name, ...) \
  REFUSE(refuses_fd(WRITE, fd)); \
  if (refuses_fd(SHORT, fd)) return short_vector(fd, vector, count, at); \
  return REAL(name)(fd, vector, count, at, ##__VA_ARGS__)

ssize_t pwritev(int fd, const struct iovec *vector, int count, off_t at) { VECTOR_WRITE(pwritev); }
ssize_t pwritev64(int fd, const struct iovec *vector, int count, off64_t at) { VECTOR_WRITE(pwritev64); }
ssize_t pwritev2(int fd, const struct iovec *vector, int count, off_t at, int flags) { VECTOR_WRITE(pwritev2, flags); }
ssize_t pwritev64v2(int fd, const struct iovec *vector, int count, off64_t at, int flags) {
  VECTOR_WRITE(pwritev64v2, flags);
}

int fdatasync(int fd) { REFUSE(refuses_fd(SYNC, fd)); return REAL(fdatasync)(fd); }
int fsync(int fd) { REFUSE(refuses_fd(SYNC, fd)); return REAL(fsync)(fd); }
int syncfs(int fd) { REFUSE(refuses_fd(SYNCFS, fd)); return REAL(syncfs)(fd); }
int fallocate(int fd, int mode, off_t at, off_t length) {
  REFUSE(refuses_fd(ALLOCATE, fd));
  return REAL(fallocate)(fd, mode, at, length);
}
int fallocate64(int fd, int mode, off64_t at, off64_t length) {
  REFUSE(refuses_fd(ALLOCATE, fd));
  return REAL(fallocate64)(fd, mode, at, length);
}
int ftruncate(int fd, off_t length) { REFUSE(refuses_fd(CUT, fd)); return REAL(ftruncate)(fd, length); }
int ftruncate64(int fd, off64_t length) { REFUSE(refuses_fd(CUT, fd)); return REAL(ftruncate64)(fd, length); }
ssize_t preadv2(int fd, const struct iovec *vector, int count, off_t at, int flags) {
  REFUSE(refuses_fd(READ, fd));
  return REAL(preadv2)(fd, vector, count, at, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *vector, int count, off64_t at, int flags) {
  REFUSE(refuses_fd(READ, fd));
  return REAL(preadv64v2)(fd, vector, count, at, flags);
}

int rename(const char *from, const char *to) { REFUSE(refuses(RENAME, from)); return REAL(rename)(from, to); }
int unlink(const char *path) { REFUSE(refuses(UNLINK, path)); return REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { REFUSE(refuses(MKDIR, path)); return REAL(mkdir)(path, mode); }

/* Opening for writing, or making a file. */
#define OPENING(path, flags) \
  mode_t mode = 0; \
  va_list rest; \
  va_start(rest, flags); \
  if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(rest, mode_t); \
  va_end(rest); \
  if (flags & (O_WRONLY | O_RDWR | O_CREAT)) REFUSE(refuses(OPEN, path))

int open(const char *path, int flags, ...) { OPENING(path, flags); return REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { OPENING(path, flags); return REAL(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) {
  OPENING(path, flags);
  return REAL(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
  OPENING(path, flags);
  return REAL(openat64)(at, path, flags, mode);
}
