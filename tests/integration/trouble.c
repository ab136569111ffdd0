/* Preloaded into a daemon by tests: makes its workers crash while they start, or hang in the kernel, and the supervisor
 * die while it accepts, when it is told to.
 *
 * Every child names itself with prctl(PR_SET_NAME, "mps-<name>"); that is where this looks:
 *   $TROUBLE_DIR/crash-<name>   exists: the child dies of SIGSEGV at once
 *   SIGRTMIN+5                  makes a child create $TROUBLE_DIR/disk/hang: on a frozen disk it never comes back
 * And where a TCP connection has just been accepted:
 *   $TROUBLE_DIR/die-accepting  is removed, and the process killed, before it knows of the connection
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static char hang_path[PATH_MAX];

static void hang(int number)
{
    (void)number;
    int fd = open(hang_path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0)
        close(fd);
}

static void look(const char *name)
{
    const char *home = getenv("TROUBLE_DIR");
    char path[PATH_MAX];
    if (home == NULL || strncmp(name, "mps-", 4) != 0)
        return;
    snprintf(path, sizeof path, "%s/crash-%s", home, name + 4);
    if (access(path, F_OK) == 0) {
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
    }
    snprintf(hang_path, sizeof hang_path, "%s/disk/hang", home);
    signal(SIGRTMIN + 5, hang);
}

int prctl(int option, ...)
{
    va_list rest;
    va_start(rest, option);
    unsigned long a = va_arg(rest, unsigned long), b = va_arg(rest, unsigned long);
    unsigned long c = va_arg(rest, unsigned long), d = va_arg(rest, unsigned long);
    va_end(rest);
    int result = (int)syscall(SYS_prctl, option, a, b, c, d);
    if (option == PR_SET_NAME)
        look((const char *)a);
    return result;
}

int accept4(int listener, struct sockaddr *address, socklen_t *length, int flags)
{
    int fd = (int)syscall(SYS_accept4, listener, address, length, flags);
    const char *home = getenv("TROUBLE_DIR");
    char path[PATH_MAX];
    if (fd >= 0 && home != NULL && address->sa_family == AF_INET) {
        snprintf(path, sizeof path, "%s/die-accepting", home);
        if (unlink(path) == 0)
            kill(getpid(), SIGKILL);
    }
    return fd;
}
