// Sends HTTP requests to 127.0.0.1 and counts the answers, in an open loop (a request every 1/RATE seconds, whatever became of the others)
// or a closed one (RATE 0: each connection sends the next request when it is answered). One thread.
//
//   paced PORT RATE SECONDS CONNECTIONS FILE
//
// FILE: whole requests, each after its length (uint32, little endian); they are sent in turns. In an open loop a request is sent by a connection
// that is free, or a new one; where CONNECTIONS are in use already it is counted as unsent. Latency counts from when a request was due.
// Prints JSON: by status, how many answers and their latency in milliseconds.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 4096, STATUSES = 600 };
static const double PATIENCE = 15.0;  // seconds after the last request in which answers are waited for

typedef struct {
    int fd, status, filled, close_after;
    long long body;  // bytes still to come; -1: in the head
    double due;
    const char* out;
    size_t out_left;
    char head[HEAD];
} Connection;

typedef struct {
    float* values;
    size_t count, room;
} Samples;

static int port, poller;
static Connection* connections;
static int *idle, idle_count, opened, most;
static Samples samples[STATUSES];
static char* requests;
static size_t* offsets;
static size_t request_count, next_request;
static long long sent, unsent, lost, refused, in_flight;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void fail(const char* what) {
    perror(what);
    exit(2);
}

static void record(int status, double seconds) {
    Samples* s = &samples[status > 0 && status < STATUSES ? status : 0];
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 1024;
        s->values = realloc(s->values, s->room * sizeof *s->values);
        if (!s->values) fail("realloc");
    }
    s->values[s->count++] = (float)(1e3 * seconds);
}

static void watch(Connection* c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event)) fail("epoll_ctl");
}

static int dial(Connection* c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) return 0;
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr*)&to, sizeof to) && errno != EINPROGRESS) {
        close(c->fd);
        c->fd = -1;
        return 0;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl");
    opened++;
    return 1;
}

static void hang_up(Connection* c) {
    if (c->due > 0) {
        lost++;
        in_flight--;
        c->due = 0;
    }
    close(c->fd);
    c->fd = -1;
    opened--;
}

static void push(Connection* c) {
    while (c->out_left) {
        ssize_t n = send(c->fd, c->out, c->out_left, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN || errno == ENOTCONN || errno == EINPROGRESS) {
                watch(c, EPOLLIN | EPOLLOUT);
                return;
            }
            c->out_left = 0;  // an answer may have come all the same
            return;
        }
        c->out += n;
        c->out_left -= (size_t)n;
    }
    watch(c, EPOLLIN);
}

static void begin(Connection* c, double due) {
    size_t r = next_request++ % request_count;
    c->out = requests + offsets[r];
    c->out_left = offsets[r + 1] - offsets[r] - sizeof(uint32_t);
    c->due = due;
    c->body = -1;
    c->filled = c->status = c->close_after = 0;
    sent++;
    in_flight++;
    push(c);
}

// One of those that are open and free, or a new one; NULL where there is none.
static Connection* free_connection(void) {
    while (idle_count) {
        Connection* c = &connections[idle[--idle_count]];
        if (c->fd >= 0 && c->due == 0) return c;
    }
    if (opened >= most) return NULL;
    for (int i = 0; i < most; i++) {
        static int at;
        at = (at + 1) % most;
        if (connections[at].fd < 0) return dial(&connections[at]) ? &connections[at] : NULL;
    }
    return NULL;
}

static void answered(Connection* c) {
    record(c->status, now() - c->due);
    c->due = 0;
    in_flight--;
    if (c->close_after) hang_up(c);
    else if (idle_count < 4 * most) idle[idle_count++] = (int)(c - connections);  // one that was closed and opened again may be there twice
}

static void parse_head(Connection* c, char* end) {
    *end = 0;
    if (sscanf(c->head, "HTTP/1.%*d %d", &c->status) != 1) c->status = 0;
    c->body = 0;
    for (char* line = strstr(c->head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (!strncasecmp(line + 2, "content-length:", 15)) c->body = atoll(line + 17);
        if (!strncasecmp(line + 2, "connection: close", 17)) c->close_after = 1;
    }
}

static void receive(Connection* c) {
    static char buffer[1 << 16];
    for (;;) {
        ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
        if (n <= 0) {
            if (n < 0 && errno == EAGAIN) return;
            if (n < 0 && errno == ECONNREFUSED) refused++;
            hang_up(c);
            return;
        }
        if (c->due == 0) continue;  // said without having been asked, before it closes
        char* data = buffer;
        if (c->body < 0) {
            int room = HEAD - 1 - c->filled, taken = n < room ? (int)n : room;
            memcpy(c->head + c->filled, data, (size_t)taken);
            int before = c->filled;
            c->filled += taken;
            c->head[c->filled] = 0;
            char* end = strstr(c->head, "\r\n\r\n");
            if (!end) {
                if (c->filled == HEAD - 1) hang_up(c);
                if (c->fd < 0) return;
                continue;
            }
            int used = (int)(end + 4 - c->head) - before;
            parse_head(c, end);
            data += used;
            n -= used;
        }
        c->body -= n;
        if (c->body <= 0) {
            answered(c);
            if (c->fd < 0) return;
        }
    }
}

static int ascending(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

static void read_requests(const char* path) {
    FILE* f = fopen(path, "rb");
    if (!f) fail(path);
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    requests = malloc((size_t)size + 4);
    offsets = malloc(((size_t)size / 4 + 2) * sizeof *offsets);
    if (!requests || !offsets || fread(requests, 1, (size_t)size, f) != (size_t)size) fail(path);
    fclose(f);
    size_t at = 0;
    while (at + 4 <= (size_t)size) {
        uint32_t length;
        memcpy(&length, requests + at, 4);
        offsets[request_count++] = at + 4;
        at += 4 + length;
    }
    offsets[request_count] = at + 4;  // where the next one would begin
    if (!request_count) {
        fprintf(stderr, "%s: no requests\n", path);
        exit(2);
    }
}

int main(int argc, char** argv) {
    if (argc != 6) {
        fprintf(stderr, "paced PORT RATE SECONDS CONNECTIONS FILE\n");
        return 2;
    }
    port = atoi(argv[1]);
    double rate = atof(argv[2]), seconds = atof(argv[3]);
    most = atoi(argv[4]);
    read_requests(argv[5]);
    connections = calloc((size_t)most, sizeof *connections);
    idle = calloc((size_t)most * 4, sizeof *idle);
    for (int i = 0; i < most; i++) connections[i].fd = -1;
    poller = epoll_create1(0);
    double start = now(), end = start + seconds, latest = 0;
    long long due_count = 0;
    struct epoll_event events[256];
    for (;;) {
        double t = now();
        if (t < end && rate > 0) {
            for (; start + (double)due_count / rate <= t; due_count++) {
                double due = start + (double)due_count / rate;
                if (t - due > latest) latest = t - due;  // how far the client itself lags
                Connection* c = free_connection();
                if (c) begin(c, due);
                else unsent++;
            }
        } else if (t < end) {
            for (Connection* c; in_flight < most && (c = free_connection());) begin(c, now());
        } else if (!in_flight || t > end + PATIENCE) break;
        double wait = rate > 0 && t < end ? start + (double)due_count / rate - now() : 0.02;
        int n = epoll_wait(poller, events, 256, wait < 0.001 ? (wait > 0) : wait > 0.02 ? 20 : (int)(1e3 * wait));
        for (int i = 0; i < n; i++) {
            Connection* c = events[i].data.ptr;
            if (c->fd < 0) continue;
            if (events[i].events & EPOLLOUT) push(c);
            if (c->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
        }
    }
    lost += in_flight;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + 1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    printf("{\"sent\": %lld, \"unsent\": %lld, \"lost\": %lld, \"refused_connections\": %lld, \"client_lag_ms\": %.3f, \"cpu_s\": %.3f, "
           "\"seconds\": %.3f, \"statuses\": {", sent, unsent, lost, refused, 1e3 * latest, cpu, now() - start);
    const char* comma = "";
    for (int status = 0; status < STATUSES; status++) {
        Samples* s = &samples[status];
        if (!s->count) continue;
        qsort(s->values, s->count, sizeof *s->values, ascending);
        printf("%s\"%d\": {\"count\": %zu, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f}", comma, status, s->count,
               s->values[s->count / 2], s->values[(size_t)(0.99 * (double)(s->count - 1))], s->values[s->count - 1]);
        comma = ", ";
    }
    printf("}}\n");
    return 0;
}
