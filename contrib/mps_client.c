/* mps_client: a client of MPS/1 that loses and doubles nothing. C99, POSIX, libc; written from docs/protocol.md.
 *
 *   cc -O2 -o mps_client mps_client.c
 *   mps_client [options] HOST:PORT[,HOST:PORT...]      packets come from standard input, or with -n are generated
 *
 *   -i ID     client id (mps-client)    -s BYTES  size of a packet (16)     -b COUNT    packets kept until acknowledged
 *   -t TOKEN  the listener's token      -n COUNT  generate so many packets  -f N        the first one's number (0)
 *   -r RATE   packets a second (0: as fast as they are taken)               -d SECONDS  give up after that (0: never)
 *   -v        print "acked N" whenever it rises; connections that come and go are told on stderr
 * Generated packet k is k in 8 bytes, little-endian, then byte j is (131 * k + j) mod 256. Exit code 0: everything is
 * acknowledged; 1: refused, given up, or input that ends inside a packet (stderr says which); 2: bad usage.
 *
 * As a library: -DMPS_NO_MAIN; mps_open; mps_send and mps_poll in a loop; mps_flush; mps_close. One thread a struct;
 * only resolving a name may block. What is in the ring is lost with the process. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MPS_LINE = 512, MPS_SERVERS = 8, MPS_PAUSE_MIN_MS = 100, MPS_PAUSE_MAX_MS = 10000 };
enum mps_state { MPS_WAITING, MPS_CONNECTING, MPS_ASKING, MPS_SENDING, MPS_FAILED };
static const int64_t mps_patience_ms[] = {0, 10000, 30000, 60000, 0}; /* the server's longest silence, by state */

struct mps {
    enum mps_state state;
    uint64_t acked, taken;   /* packets since mps_open: acknowledged, given to mps_send; the ring has those between */
    uint64_t sent, sent_max; /* bytes since mps_open: as this connection counts, and ever */
    uint64_t shift, epoch;   /* the server's index = packets since mps_open + shift, modulo 2^64 */
    int known, bare;         /* epoch and shift are known; the next hello goes without them */
    int fd, wake_fd;         /* mps_poll returns early when wake_fd is readable; -1: none */
    int chatty, server_count;
    unsigned turn, home, failures, random; /* server in use; the one that gave the epoch; failed in a row */
    int64_t not_before, heard;             /* ms: no connection before; the server's last word */
    size_t size, capacity, line_bytes, hello_bytes, hello_sent;
    uint8_t *ring;
    char *list, *servers[MPS_SERVERS], id[80], token[160], line[MPS_LINE], hello[MPS_LINE], error[2 * MPS_LINE];
};

static int64_t mps_now(void)
{
    struct timespec t = {0, 0};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Connects to nobody yet. -1: no memory, or bad arguments. */
int mps_open(struct mps *m, const char *id, size_t size, const char *servers, size_t capacity, const char *token)
{
    *m = (struct mps){.fd = -1, .wake_fd = -1, .size = size, .capacity = capacity};
    m->random = (unsigned)mps_now() ^ (unsigned)getpid() << 16;
    snprintf(m->id, sizeof m->id, "%s", id);
    snprintf(m->token, sizeof m->token, "%s%s", token ? " token=" : "", token ? token : "");
    if (!size || !capacity || capacity > SIZE_MAX / size || !(m->list = strdup(servers)))
        return -1;
    for (char *word = strtok(m->list, ","); word && m->server_count < MPS_SERVERS; word = strtok(NULL, ","))
        m->servers[m->server_count++] = word;
    m->ring = malloc(size * capacity);
    return m->server_count && m->ring ? 0 : -1;
}

/* Copies as many packets as there is room for. Returns how many, or -1 after a final refusal (m->error says why). */
long mps_send(struct mps *m, const void *packets, long count)
{
    uint64_t room = m->capacity - (m->taken - m->acked), wanted = (uint64_t)count < room ? (uint64_t)count : room;
    for (uint64_t i = 0; i < wanted && m->state != MPS_FAILED; i++, m->taken++)
        memcpy(m->ring + m->taken % m->capacity * m->size, (const uint8_t *)packets + i * m->size, m->size);
    return m->state == MPS_FAILED ? -1 : (long)wanted;
}

/* The connection is over, perhaps for good. Below 0 the pause grows, and a server that gave no OK loses its turn. */
static void mps_over(struct mps *m, const char *why, int final, int64_t pause_ms)
{
    int answered = m->state == MPS_SENDING;
    snprintf(m->error, sizeof m->error, "%s: %s", m->servers[m->turn % (unsigned)m->server_count], why);
    if (m->chatty)
        fprintf(stderr, "mps_client: %s\n", m->error);
    if (m->fd >= 0)
        close(m->fd);
    m->fd = -1;
    m->state = final ? MPS_FAILED : MPS_WAITING;
    if (pause_ms < 0) {
        m->bare = 0, pause_ms = (int64_t)MPS_PAUSE_MIN_MS << (m->failures < 7 ? m->failures++ : 7);
        pause_ms = pause_ms < MPS_PAUSE_MAX_MS ? pause_ms : MPS_PAUSE_MAX_MS;
        m->random = m->random * 1103515245u + 12345u;
        pause_ms -= (int64_t)(m->random >> 8) % (pause_ms / 2); /* who fell together does not come back together */
        if (!answered && ++m->turn % (unsigned)m->server_count)
            pause_ms = 0; /* the next one of the list at once, a pause after each round */
    }
    m->not_before = mps_now() + pause_ms;
}

static void mps_connect(struct mps *m)
{
    char host[256], where[64] = "";
    struct addrinfo *all = NULL, *it, hints = {.ai_socktype = SOCK_STREAM};
    const char *server = m->servers[m->turn % (unsigned)m->server_count], *colon = strrchr(server, ':');
    int bracket = *server == '[', one = 1, length = colon ? (int)(colon - server) - 2 * bracket : 0;
    m->state = MPS_CONNECTING;
    m->heard = mps_now();
    m->line_bytes = m->hello_sent = 0;
    m->bare |= m->home != m->turn % (unsigned)m->server_count && !(m->acked + m->shift); /* an epoch is one spool's */
    if (m->known && !m->bare)
        snprintf(where, sizeof where, " epoch=%016" PRIx64 " first=%" PRIu64, m->epoch, m->acked + m->shift);
    m->hello_bytes = (size_t)snprintf(m->hello, sizeof m->hello, "MPS/1 %s %zu%s%s\n", m->id, m->size, m->token, where);
    snprintf(host, sizeof host, "%.*s", length, server + bracket);
    int fault = length > 0 ? getaddrinfo(host, colon + 1, &hints, &all) : EAI_NONAME;
    if (fault)
        mps_over(m, gai_strerror(fault), 0, -1);
    if (!(it = all)) /* of a name with several addresses the next one each round: */
        return;
    for (unsigned skip = m->turn / (unsigned)m->server_count % 4; skip && it->ai_next; skip--)
        it = it->ai_next;
    m->fd = socket(it->ai_family, it->ai_socktype, it->ai_protocol);
    if (m->fd < 0 || fcntl(m->fd, F_SETFL, O_NONBLOCK) || fcntl(m->fd, F_SETFD, FD_CLOEXEC) ||
        setsockopt(m->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) ||
        (connect(m->fd, it->ai_addr, it->ai_addrlen) && errno != EINPROGRESS))
        mps_over(m, strerror(errno), 0, -1);
    freeaddrinfo(all);
}

static void mps_ok(struct mps *m, uint64_t next, uint64_t epoch)
{
    if (!m->known || m->epoch != epoch)
        m->shift = next - m->acked; /* a numbering that is new to us: our oldest packet gets the next index */
    else if (next - m->shift - m->acked > m->sent_max / m->size - m->acked) {
        mps_over(m, "it goes on with a packet that is not ours: has another device this client id?", 1, 0);
        return;
    }
    m->acked = next - m->shift;
    m->sent = m->acked * m->size;
    m->epoch = epoch, m->known = 1, m->bare = 0, m->failures = 0, m->state = MPS_SENDING;
    m->home = m->turn % (unsigned)m->server_count;
    if (m->chatty)
        fprintf(stderr, "mps_client: %s: %s\n", m->servers[m->home], m->line);
}

/* One whole line, without its end. */
static void mps_line(struct mps *m, const char *line)
{
    uint64_t number, epoch;
    long retry = -1;
    char word[40], rest;
    int asking = m->state == MPS_ASKING;
    if (!*line || !strcmp(line, "A") || !strcmp(line, "AC") || !strcmp(line, "ACK") || !strcmp(line, "ACK "))
        return; /* empty, or torn off when a worker of the server died */
    if (!asking && sscanf(line, "ACK %" SCNu64 "%c", &number, &rest) == 1) {
        if (number > m->shift + m->acked + (m->sent / m->size - m->acked))
            mps_over(m, "it acknowledges what was not sent", 0, -1);
        else if (number > m->shift + m->acked) { /* else torn: true, but nothing new */
            m->acked = number - m->shift;
            if (m->chatty)
                printf("acked %" PRIu64 "\n", number);
        }
    } else if (asking && sscanf(line, "OK %" SCNu64 " %32s %16" SCNx64 "%c", &number, word, &epoch, &rest) == 3)
        mps_ok(m, number, epoch);
    else if (asking && sscanf(line, "ERR %32s", word) == 1) {
        int passing = !strcmp(word, "timeout") || !strcmp(word, "in-use") || !strcmp(word, "busy") ||
                      !strcmp(word, "unavailable") || !strcmp(word, "quarantined");
        int elsewhere = m->home != m->turn % (unsigned)m->server_count && !m->bare && !strcmp(word, "epoch");
        m->bare = elsewhere; /* not the server that gave the epoch: let it number by itself */
        mps_over(m, line, !passing && !elsewhere, elsewhere ? 0 : -1);
    } else if (sscanf(line, "BYE %32s retry=%ld", word, &retry) >= 1)
        mps_over(m, line, 0, retry < 0 ? -1 : (retry < 3600 ? retry : 3600) * 1000);
    else
        mps_over(m, "it does not speak MPS/1", 0, -1);
}

static void mps_hear(struct mps *m)
{
    char got[4096];
    ssize_t bytes = recv(m->fd, got, sizeof got, 0);
    if (bytes < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (bytes <= 0)
        mps_over(m, bytes ? strerror(errno) : "it closed the connection", 0, -1);
    m->heard = mps_now();
    for (ssize_t i = 0; i < bytes && m->fd >= 0; i++) {
        if (got[i] == '\n') {
            m->line_bytes -= m->line_bytes && m->line[m->line_bytes - 1] == '\r';
            m->line[m->line_bytes] = 0;
            m->line_bytes = 0;
            mps_line(m, m->line);
        } else if (m->line_bytes < MPS_LINE - 1)
            m->line[m->line_bytes++] = got[i];
        else
            mps_over(m, "it sends overlong lines", 0, -1);
    }
}

static void mps_write(struct mps *m)
{
    int hello = m->state != MPS_SENDING;
    size_t whole = m->size * m->capacity, at = (size_t)(m->sent % whole), left = (size_t)(m->taken * m->size - m->sent);
    const void *from = hello ? (const void *)(m->hello + m->hello_sent) : m->ring + at;
    if (m->state == MPS_CONNECTING || m->sent == m->acked * m->size)
        m->heard = mps_now(); /* from now on it owes an answer */
    m->state = hello ? MPS_ASKING : MPS_SENDING;
    left = hello ? m->hello_bytes - m->hello_sent : left < whole - at ? left : whole - at;
    ssize_t took = send(m->fd, from, left, MSG_NOSIGNAL);
    if (took < 0 && errno != EAGAIN && errno != EINTR)
        mps_hear(m); /* has the error too, and what the server said before it */
    else if (took > 0 && hello)
        m->hello_sent += (size_t)took;
    else if (took > 0 && (m->sent += (uint64_t)took) > m->sent_max)
        m->sent_max = m->sent;
}

/* Moves what can be moved, and waits at most timeout_ms for that. -1: refused for good (m->error says why). */
int mps_poll(struct mps *m, int timeout_ms)
{
    if (m->state == MPS_WAITING && mps_now() >= m->not_before)
        mps_connect(m);
    int64_t wait = m->state == MPS_WAITING ? m->not_before - mps_now() : 1000;
    int writes = m->state == MPS_CONNECTING || (m->state == MPS_ASKING && m->hello_sent < m->hello_bytes) ||
                 (m->state == MPS_SENDING && m->sent < m->taken * m->size);
    struct pollfd polls[] = {{m->fd, (short)(writes ? POLLIN | POLLOUT : POLLIN), 0}, {m->wake_fd, POLLIN, 0}};
    poll(polls, 2, m->state == MPS_FAILED || wait < 0 ? 0 : wait < timeout_ms ? (int)wait : timeout_ms);
    if (m->fd >= 0 && polls[0].revents & ~POLLOUT)
        mps_hear(m); /* also why it cannot be reached */
    if (m->fd >= 0 && polls[0].revents & POLLOUT)
        mps_write(m);
    int owes = m->state != MPS_SENDING || m->sent > m->acked * m->size;
    if (m->fd >= 0 && owes && mps_now() - m->heard > mps_patience_ms[m->state])
        mps_over(m, "it said nothing for too long", 0, -1);
    return m->state == MPS_FAILED ? -1 : 0;
}

/* 0: everything is acknowledged; 1: not before mps_now() is end_ms (0: no end); -1: refused for good. */
int mps_flush(struct mps *m, int64_t end_ms)
{
    while (m->acked < m->taken && (!end_ms || mps_now() < end_ms))
        if (mps_poll(m, 100))
            return -1;
    return m->acked < m->taken;
}

/* What is not acknowledged is given up. */
void mps_close(struct mps *m)
{
    if (m->fd >= 0)
        close(m->fd);
    free(m->ring), free(m->list);
    *m = (struct mps){.state = MPS_FAILED, .fd = -1, .wake_fd = -1};
}

#ifndef MPS_NO_MAIN
int main(int words, char **word)
{
    const char *id = "mps-client", *token = NULL;
    uint64_t size = 16, count = 0, first = 0, rate = 0, keep = 65536, seconds = 0, made = 0;
    uint64_t *numbers[] = {['s'] = &size, ['n'] = &count, ['f'] = &first, ['r'] = &rate, ['b'] = &keep,
                           ['d'] = &seconds, ['v'] = NULL};
    int generate = 0, chatty = 0, bad = 0, ended = 0;
    for (int o; (o = getopt(words, word, "i:t:s:n:f:r:b:d:v")) != -1; generate |= o == 'n', chatty |= o == 'v') {
        char *rest = o == '?' ? "bad" : "";
        if (numbers[o])
            *numbers[o] = strtoull(optarg, &rest, 10);
        bad |= *rest != 0, id = o == 'i' ? optarg : id, token = o == 't' ? optarg : token;
    }
    static uint8_t buffer[65536];
    struct mps m;
    if (bad || words - optind != 1 || size > sizeof buffer || mps_open(&m, id, size, word[optind], keep, token))
        return fputs("mps_client [options] HOST:PORT[,HOST:PORT...]; see the top of mps_client.c\n", stderr), 2;
    int64_t start = mps_now(), end = seconds ? start + (int64_t)seconds * 1000 : 0;
    size_t have = 0, space = sizeof buffer - sizeof buffer % size;
    for (m.chatty = chatty; (!ended || have >= size) && (!end || mps_now() < end); mps_poll(&m, rate ? 1 : 100)) {
        uint64_t due = rate ? (uint64_t)(mps_now() - start) * rate / 1000 + 1 : count;
        for (; generate && have < space && made < count && made < due; made++)
            for (uint64_t j = 0; j < size; j++)
                buffer[have++] = (uint8_t)(j < 8 ? (first + made) >> 8 * j : 131 * (first + made) + j);
        if (!generate && !ended && have < size && poll(&(struct pollfd){0, POLLIN, 0}, 1, 0) > 0) {
            ssize_t got = read(0, buffer + have, space - have);
            ended = got <= 0;
            have += ended ? 0 : (size_t)got;
        }
        long took = mps_send(&m, buffer, (long)(have / size));
        if (took < 0)
            break;
        memmove(buffer, buffer + (size_t)took * size, have -= (size_t)took * size);
        ended |= generate && made == count;
        m.wake_fd = generate || ended || have >= size ? -1 : 0;
    }
    int failed = !ended || have >= size || mps_flush(&m, end);
    if (failed || have)
        fprintf(stderr, "mps_client: %s\n", failed ? *m.error ? m.error : "given up" : "input ends inside a packet");
    mps_close(&m);
    return failed || have;
}
#endif
