/* A libnccl for tests: it keeps the books and moves no data.
 *
 * Beside the library lie two files. `calls` gets a line for each call with all its arguments.
 * `control` holds lines `key=number`, read anew at each call:
 *   version               what ncclGetVersion tells
 *   return:FUNCTION       the code that the function returns instead of its own
 *   null:FUNCTION         1: it leaves no communicator
 *   hang:FUNCTION         milliseconds that it takes
 *   state, state:ID       the state of all communicators, or of one (in order of their making)
 *   rank, size            what a communicator says it is, instead of the truth
 * What NCCL forbids is written to `calls` as a line that begins with VIOLATION. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SUCCESS 0
#define IN_PROGRESS 7

/* Written by hand from the layout of ncclConfig_t in NCCL 2.28.9, as the Rust side is. */
struct config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share, traffic_class;
    const char *comm_name;
    int collnet_enable, cta_policy, shrink_share, nvls_ctas, channels, nvlink;
};
struct unique_id { unsigned char bytes[128]; };
struct comm {
    int id, rank, size, is_gone;
    struct comm *child, **child_slot;
};

static atomic_int num_comms, num_inside;
static _Thread_local int group_depth;
static char last_error[128] = "";

static void beside(char *path, const char *name) {
    Dl_info info;
    if (!dladdr((void *)&beside, &info)) abort();
    snprintf(path, PATH_MAX, "%s", info.dli_fname);
    char *slash = strrchr(path, '/');
    snprintf(slash + 1, PATH_MAX - (size_t)(slash + 1 - path), "%s", name);
}

static void record(const char *format, ...) {
    char path[PATH_MAX], line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    beside(path, "calls");
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file < 0 || write(file, line, (size_t)length) != length) abort();
    close(file);
}

static long told(const char *key, long otherwise) {
    char path[PATH_MAX], line[256];
    beside(path, "control");
    FILE *file = fopen(path, "r");
    if (!file) return otherwise;
    while (fgets(line, sizeof line, file)) {
        char *equals = strchr(line, '=');
        if (!equals) continue;
        *equals = 0;
        if (!strcmp(line, key)) otherwise = atol(equals + 1);
    }
    fclose(file);
    return otherwise;
}

static long told_of(const char *kind, const char *function, long otherwise) {
    char key[128];
    snprintf(key, sizeof key, "%s:%s", kind, function);
    return told(key, otherwise);
}

/* Begins a call on a communicator. */
static void enter(const char *function, struct comm *comm) {
    if (comm && comm->is_gone) record("VIOLATION %s after the end of %d", function, comm->id);
    if (comm && num_inside > 0) record("VIOLATION %s beside another call", function);
    num_inside++;
    long hang_ms = told_of("hang", function, 0);
    struct timespec time = {hang_ms / 1000, hang_ms % 1000 * 1000000};
    if (hang_ms) nanosleep(&time, NULL);
}

static int leave(const char *function) {
    num_inside--;
    int code = (int)told_of("return", function, SUCCESS);
    if (code != SUCCESS && code != IN_PROGRESS)
        snprintf(last_error, sizeof last_error, "fake %s was told to fail", function);
    return code;
}

static int state_of(struct comm *comm) {
    char id[16];
    snprintf(id, sizeof id, "%d", comm->id);
    return (int)told_of("state", id, told("state", SUCCESS));
}

static struct comm *new_comm(int rank, int size) {
    struct comm *comm = calloc(1, sizeof *comm);
    if (!comm) abort();
    comm->id = ++num_comms;
    comm->rank = rank;
    comm->size = size;
    return comm;
}

int ncclGetVersion(int *version) {
    *version = (int)told("version", 22809);
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    static _Thread_local char text[32];
    snprintf(text, sizeof text, "meaning of %d", code);
    return text;
}

const char *ncclGetLastError(struct comm *comm) {
    (void)comm;
    return last_error;
}

int ncclGetUniqueId(struct unique_id *id) {
    record("ncclGetUniqueId");
    for (int i = 0; i < 128; i++) id->bytes[i] = (unsigned char)(3 * i + 1);
    enter("ncclGetUniqueId", NULL);
    return leave("ncclGetUniqueId");
}

int ncclCommInitRankConfig(struct comm **comm, int size, struct unique_id id, int rank,
                           struct config *config) {
    int is_whole = 1, is_default = 1;
    for (int i = 0; i < 128; i++) is_whole &= id.bytes[i] == (unsigned char)(3 * i + 1);
    int undefined[] = {config->cga_cluster_size, config->min_ctas, config->max_ctas,
                       config->split_share, config->traffic_class, config->collnet_enable,
                       config->cta_policy, config->shrink_share, config->nvls_ctas,
                       config->channels, config->nvlink};
    for (size_t i = 0; i < sizeof undefined / sizeof *undefined; i++)
        is_default &= undefined[i] == INT_MIN;
    is_default &= !config->net_name && !config->comm_name;
    record("ncclCommInitRankConfig rank=%d size=%d id=%s bytes=%zu/%zu magic=%x version=%u "
           "blocking=%d default=%d", rank, size, is_whole ? "whole" : "torn", config->size,
           sizeof *config, config->magic, config->version, config->blocking, is_default);
    enter("ncclCommInitRankConfig", NULL);
    *comm = told_of("null", "ncclCommInitRankConfig", 0) ? NULL : new_comm(rank, size);
    return leave("ncclCommInitRankConfig");
}

#ifndef WITHOUT_SPLIT
int ncclCommSplit(struct comm *comm, int color, int key, struct comm **child,
                  struct config *config) {
    record("ncclCommSplit comm=%d color=%d key=%d config=%s", comm->id, color, key,
           config ? "given" : "inherited");
    enter("ncclCommSplit", comm);
    *child = NULL;
    /* As NCCL does it, the child is left only when the state is asked for and found well. */
    if (color >= 0) {
        comm->child = new_comm(key, comm->size / 2);
        comm->child_slot = child;
    }
    return leave("ncclCommSplit");
}
#endif

int ncclCommGetAsyncError(struct comm *comm, int *state) {
    enter("ncclCommGetAsyncError", comm);
    *state = state_of(comm);
    if (*state == SUCCESS && comm->child_slot) {
        __atomic_store_n(comm->child_slot, comm->child, __ATOMIC_RELEASE);
        comm->child_slot = NULL;
    }
    return leave("ncclCommGetAsyncError");
}

int ncclCommCount(struct comm *comm, int *count) {
    enter("ncclCommCount", comm);
    *count = (int)told("size", comm->size);
    return leave("ncclCommCount");
}

int ncclCommUserRank(struct comm *comm, int *rank) {
    enter("ncclCommUserRank", comm);
    *rank = (int)told("rank", comm->rank);
    return leave("ncclCommUserRank");
}

static int end(const char *function, struct comm *comm, int is_gone) {
    record("%s comm=%d", function, comm->id);
    enter(function, comm);
    comm->is_gone = is_gone;
    /* An abort waits for the thread that makes the child, which leaves it where it was told. */
    if (is_gone && comm->child_slot) *comm->child_slot = comm->child;
    return leave(function);
}
int ncclCommFinalize(struct comm *comm) { return end("ncclCommFinalize", comm, 0); }
int ncclCommDestroy(struct comm *comm) { return end("ncclCommDestroy", comm, 1); }
int ncclCommAbort(struct comm *comm) { return end("ncclCommAbort", comm, 1); }

static int work(const char *function, struct comm *comm, const char *format, ...) {
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    record("%s comm=%d depth=%d %s", function, comm->id, group_depth, line);
    int begins_work = told_of("return", function, SUCCESS) == IN_PROGRESS;
    if (state_of(comm) == IN_PROGRESS && !begins_work)
        record("VIOLATION %s while in progress", function);
    enter(function, comm);
    return leave(function);
}

int ncclAllReduce(const void *from, void *to, size_t count, int dtype, int op, struct comm *comm,
                  void *stream) {
    return work("ncclAllReduce", comm, "from=%p to=%p count=%zu dtype=%d op=%d stream=%p", from, to,
                count, dtype, op, stream);
}
int ncclAllGather(const void *from, void *to, size_t count, int dtype, struct comm *comm,
                  void *stream) {
    return work("ncclAllGather", comm, "from=%p to=%p count=%zu dtype=%d stream=%p", from, to,
                count, dtype, stream);
}
int ncclReduceScatter(const void *from, void *to, size_t count, int dtype, int op,
                      struct comm *comm, void *stream) {
    return work("ncclReduceScatter", comm, "from=%p to=%p count=%zu dtype=%d op=%d stream=%p", from,
                to, count, dtype, op, stream);
}
int ncclBroadcast(const void *from, void *to, size_t count, int dtype, int root, struct comm *comm,
                  void *stream) {
    return work("ncclBroadcast", comm, "from=%p to=%p count=%zu dtype=%d root=%d stream=%p", from,
                to, count, dtype, root, stream);
}
int ncclSend(const void *from, size_t count, int dtype, int peer, struct comm *comm, void *stream) {
    return work("ncclSend", comm, "from=%p count=%zu dtype=%d peer=%d stream=%p", from, count,
                dtype, peer, stream);
}
int ncclRecv(void *to, size_t count, int dtype, int peer, struct comm *comm, void *stream) {
    return work("ncclRecv", comm, "to=%p count=%zu dtype=%d peer=%d stream=%p", to, count, dtype,
                peer, stream);
}

int ncclGroupStart(void) {
    record("ncclGroupStart depth=%d", group_depth);
    enter("ncclGroupStart", NULL);
    group_depth++;
    return leave("ncclGroupStart");
}
int ncclGroupEnd(void) {
    record("ncclGroupEnd depth=%d", group_depth);
    enter("ncclGroupEnd", NULL);
    if (--group_depth < 0) record("VIOLATION ncclGroupEnd without a start");
    return leave("ncclGroupEnd");
}
