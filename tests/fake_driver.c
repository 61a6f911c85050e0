/* A stand-in for the CUDA driver (libcuda.so.1) on machines without a GPU: for tests of host code.
 *
 * Two devices, of compute capability 9.0 and 8.0. Their memory is the host's and is never used
 * twice; kernels are not run but recorded. What a driver would refuse is refused with its error
 * code, and what it would take and do wrong (work for a device other than the one that holds the
 * memory, memory freed twice) is recorded as a fault. While a stream is captured, its kernels and
 * memory become nodes of a graph, what a capture forbids is refused and ends it, and a graph's launch
 * does again what was captured. Of a graph there is one stream: events join no other to a capture.
 *
 * Build: gcc -shared -fPIC -o libcuda.so.1 fake_driver.c
 * Environment: FAKE_CUDA_FAIL=FUNCTION:N:CODE lets the N-th call fail, or every one for N = 0.
 * For tests, besides the driver's functions: those whose names start with fake_.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#define DEVICES 2
#define LEGACY 1
#define PER_THREAD 2
#define ARENA (1ull << 40) /* bytes of addresses for each device */
#define MAX_ARGUMENTS 64

typedef int Result;
typedef unsigned long long Pointer;
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500, LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906, CAPTURE_WRONG_THREAD = 908, INVALID_CLUSTER_SIZE = 912,
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* -- text that grows -------------------------------------------------------------------------- */

typedef struct { char *text; size_t size, room; } Text;

static void append(Text *t, const char *format, ...) {
    va_list list;
    for (;;) {
        va_start(list, format);
        size_t left = t->room - t->size;
        int n = vsnprintf(t->text ? t->text + t->size : NULL, left, format, list);
        va_end(list);
        if (n < 0) abort();
        if ((size_t)n < left) { t->size += n; return; }
        t->room = 2 * (t->room + n + 256);
        t->text = realloc(t->text, t->room);
        if (!t->text) abort();
    }
}

static void forget(Text *t) { t->size = 0; if (t->text) t->text[0] = 0; }

static Text launches, faults, report;
static int recording = 1;

#define FAULT(...) \
    do { append(&faults, faults.size ? ",\"" : "\""); append(&faults, __VA_ARGS__); \
         append(&faults, "\""); } while (0)

/* -- counted calls, some of which fail on demand ----------------------------------------------- */

typedef struct Counter { const char *name; long count; struct Counter *next; } Counter;

static Counter *counters;
static struct { char name[64]; long left; int code, always; } failing;
static int initialized;

static void fail_from_environment(void) {
    static int done;
    const char *wish = getenv("FAKE_CUDA_FAIL");
    if (done++ || !wish) return;
    long n; int code;
    if (sscanf(wish, "%63[^:]:%ld:%d", failing.name, &n, &code) != 3) abort();
    failing.left = n; failing.code = code; failing.always = n == 0;
}

static Result enter(Counter *c) { /* holds the lock on return */
    pthread_mutex_lock(&lock);
    if (!c->count++ && !c->next) { c->next = counters ? counters : c; counters = c; }
    fail_from_environment();
    if (!failing.code || strcmp(failing.name, c->name)) return OK;
    if (!failing.always && --failing.left) return OK;
    int code = failing.code;
    if (!failing.always) failing.code = 0;
    return code;
}

static Result leave(Result code) { pthread_mutex_unlock(&lock); return code; }

#define ENTER_BEFORE_INIT \
    static Counter counter = {__func__, 0, NULL}; \
    do { Result wrong_ = enter(&counter); if (wrong_) return leave(wrong_); } while (0)
#define ENTER ENTER_BEFORE_INIT; if (!initialized) return leave(NOT_INITIALIZED)
#define RETURN(code) return leave(code)

/* -- devices and contexts ----------------------------------------------------------------------- */

typedef struct { int device; long retained; } Context;
typedef struct { int device; } Pool;
typedef struct Capture Capture;
typedef struct { int device, alive, priority; unsigned flags; Capture *capture; } Stream;

static Context contexts[DEVICES] = {{0, 0}, {1, 0}};
static Pool pools[DEVICES] = {{0}, {1}};
static const int capability[DEVICES][2] = {{9, 0}, {8, 0}};
static __thread Context *stack[64];
static __thread int depth;

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }
static int current_device(void) { return depth && current() ? current()->device : -1; }
static int valid(int device) { return device >= 0 && device < DEVICES; }

PUBLIC Result cuInit(unsigned flags) { ENTER_BEFORE_INIT; initialized = 1; RETURN(OK); }
PUBLIC Result cuDriverGetVersion(int *v) { ENTER_BEFORE_INIT; *v = 13000; RETURN(OK); }
PUBLIC Result cuDeviceGetCount(int *n) { ENTER; *n = DEVICES; RETURN(OK); }
PUBLIC Result cuDeviceGet(int *d, int ordinal) {
    ENTER;
    if (!valid(ordinal)) RETURN(INVALID_DEVICE);
    *d = ordinal;
    RETURN(OK);
}
PUBLIC Result cuDeviceGetName(char *s, int n, int d) { ENTER; snprintf(s, n, "Fake %d", d); RETURN(OK); }
PUBLIC Result cuDeviceTotalMem_v2(size_t *n, int d) { ENTER; *n = ARENA; RETURN(OK); }
PUBLIC Result cuDeviceGetUuid_v2(char *u, int d) { ENTER; memset(u, 1 + d, 16); RETURN(OK); }
PUBLIC Result cuDeviceGetUuid(char *u, int d) { return cuDeviceGetUuid_v2(u, d); }
PUBLIC Result cuDeviceComputeCapability(int *major, int *minor, int d) {
    ENTER;
    *major = capability[d][0]; *minor = capability[d][1];
    RETURN(OK);
}
PUBLIC Result cuDeviceGetAttribute(int *v, int attribute, int d) {
    ENTER;
    if (!valid(d)) RETURN(INVALID_DEVICE);
    switch (attribute) {
    case 1: case 2: case 3: *v = 1024; break;   /* threads of a block */
    case 4: *v = 64; break;
    case 5: *v = 2147483647; break;             /* blocks of a grid */
    case 6: case 7: *v = 65535; break;
    case 8: *v = 49152; break;                  /* shared memory of a block */
    case 9: case 12: case 82: *v = 65536; break;
    case 10: *v = 32; break;                    /* threads of a warp */
    case 16: *v = d ? 108 : 132; break;         /* multiprocessors */
    case 39: *v = 2048; break;
    case 75: *v = capability[d][0]; break;
    case 76: *v = capability[d][1]; break;
    case 81: case 97: *v = 232448; break;
    default: *v = 1;
    }
    RETURN(OK);
}

PUBLIC Result cuDevicePrimaryCtxRetain(Context **c, int d) {
    ENTER;
    if (!valid(d)) RETURN(INVALID_DEVICE);
    contexts[d].retained++;
    *c = &contexts[d];
    RETURN(OK);
}
PUBLIC Result cuDevicePrimaryCtxRelease_v2(int d) { ENTER; contexts[d].retained--; RETURN(OK); }
PUBLIC Result cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) {
    ENTER;
    *flags = 0; *active = contexts[d].retained > 0;
    RETURN(OK);
}
PUBLIC Result cuCtxGetCurrent(Context **c) { ENTER; *c = current(); RETURN(OK); }
PUBLIC Result cuCtxSetCurrent(Context *c) {
    ENTER;
    if (!c) { if (depth) depth--; RETURN(OK); }
    if (!depth) depth = 1;
    stack[depth - 1] = c;
    RETURN(OK);
}
PUBLIC Result cuCtxPushCurrent_v2(Context *c) {
    ENTER;
    if (!c || depth == 64) RETURN(INVALID_VALUE);
    stack[depth++] = c;
    RETURN(OK);
}
PUBLIC Result cuCtxPopCurrent_v2(Context **c) {
    ENTER;
    if (!depth) RETURN(INVALID_CONTEXT);
    depth--;
    if (c) *c = stack[depth];
    RETURN(OK);
}
PUBLIC Result cuCtxGetDevice(int *d) {
    ENTER;
    if (!current()) RETURN(INVALID_CONTEXT);
    *d = current_device();
    RETURN(OK);
}
PUBLIC Result cuCtxGetDevice_v2(int *d, Context *c) {
    ENTER;
    if (!c && !current()) RETURN(INVALID_CONTEXT);
    *d = c ? c->device : current_device();
    RETURN(OK);
}
PUBLIC Result cuCtxGetApiVersion(Context *c, unsigned *v) { ENTER; *v = 13000; RETURN(OK); }
PUBLIC Result cuCtxGetId(Context *c, uint64_t *id) {
    ENTER;
    if (!c) c = current();
    if (!c) RETURN(INVALID_CONTEXT);
    *id = 1 + c->device;
    RETURN(OK);
}
PUBLIC Result cuCtxGetFlags(unsigned *flags) { ENTER; *flags = 0; RETURN(OK); }
PUBLIC Result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER;
    *least = 0; *greatest = -5;
    RETURN(OK);
}
PUBLIC Result cuCtxGetLimit(size_t *n, int limit) { ENTER; *n = 1 << 20; RETURN(OK); }

/* -- streams and events -------------------------------------------------------------------------- */

static int numbered(const void *stream) { return (uintptr_t)stream <= PER_THREAD; }

/* The context in which a stream's work is done; that of a numbered stream is the current one. */
static Result context_of(Stream *s, Context **c) {
    if (numbered(s)) {
        *c = current();
        return *c ? OK : INVALID_CONTEXT;
    }
    if (!s->alive) return INVALID_HANDLE;
    *c = &contexts[s->device];
    return OK;
}

/* -- captures ----------------------------------------------------------------------------------- */

typedef struct Node Node;
typedef struct { Node *nodes; size_t count, room; } Graph;
struct Capture { Stream *stream; Graph *graph; int mode, valid; long thread; uint64_t id; Capture *next; };
enum { GLOBAL, THREAD_LOCAL, RELAXED };
#define NON_BLOCKING 1

static Capture *captures;
static __thread int thread_mode = GLOBAL;
static __thread Stream per_thread;

static long this_thread(void) { return syscall(SYS_gettid); }

static Capture *capture_of(Stream *s) {
    if ((uintptr_t)s == PER_THREAD) return per_thread.capture;
    return numbered(s) ? NULL : s->capture;
}

/* Whether this thread may do what is potentially unsafe while streams are captured. */
static Result unsafe(void) {
    Result wrong = OK;
    if (thread_mode == RELAXED) return OK;
    for (Capture *c = captures; c; c = c->next) {
        int own = c->thread == this_thread() && c->mode != RELAXED;
        if (!own && (thread_mode != GLOBAL || c->mode != GLOBAL)) continue;
        c->valid = 0;
        wrong = CAPTURE_UNSUPPORTED;
    }
    return wrong;
}
#define UNSAFE do { Result wrong_ = unsafe(); if (wrong_) return leave(wrong_); } while (0)

/* Before anything is queued: the default stream would have to wait for a blocking one's capture. */
static Result queue_on(Stream *s) {
    Capture *own = capture_of(s);
    if (own) return own->valid ? OK : CAPTURE_INVALIDATED;
    Result wrong = OK;
    if ((uintptr_t)s <= LEGACY)
        for (Capture *c = captures; c; c = c->next) {
            if (c->stream->flags & NON_BLOCKING || c->stream->device != current_device()) continue;
            c->valid = 0;
            wrong = CAPTURE_IMPLICIT;
        }
    return wrong;
}

/* What can be no node of a graph, and ends a stream's capture. */
static Result not_captured(Stream *s, Result code) {
    Result wrong = queue_on(s);
    if (wrong || !capture_of(s)) return wrong;
    capture_of(s)->valid = 0;
    return code;
}
#define NOT_CAPTURED(s, code) \
    do { Result wrong_ = not_captured(s, code); if (wrong_) return leave(wrong_); } while (0)

PUBLIC Result cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER;
    int before = thread_mode;
    if (*mode < GLOBAL || *mode > RELAXED) RETURN(INVALID_VALUE);
    thread_mode = *mode;
    *mode = before;
    RETURN(OK);
}
PUBLIC Result cuStreamBeginCapture_v2(Stream *s, int mode) {
    ENTER;
    static uint64_t ids;
    Context *context;
    Result wrong = context_of(s, &context);
    if (wrong) RETURN(wrong);
    if ((uintptr_t)s <= LEGACY) RETURN(CAPTURE_UNSUPPORTED);
    if (capture_of(s)) RETURN(ILLEGAL_STATE);
    if ((uintptr_t)s == PER_THREAD) {
        s = &per_thread;
        s->device = context->device;
    }
    Graph *graph = calloc(1, sizeof *graph);
    s->capture = malloc(sizeof *s->capture);
    *s->capture = (Capture){s, graph, mode, 1, this_thread(), ++ids, captures};
    captures = s->capture;
    RETURN(OK);
}
static Result capture_status(Stream *s, int *status) {
    for (Capture *c = captures; c && (uintptr_t)s <= LEGACY; c = c->next)
        if (!(c->stream->flags & NON_BLOCKING) && c->stream->device == current_device())
            return CAPTURE_IMPLICIT;
    Capture *c = capture_of(s);
    *status = !c ? 0 : c->valid ? 1 : 2;
    return OK;
}
PUBLIC Result cuStreamIsCapturing(Stream *s, int *status) { ENTER; RETURN(capture_status(s, status)); }
PUBLIC Result cuStreamGetCaptureInfo_v3(Stream *s, int *status, uint64_t *id, Graph **graph,
                                        const void **nodes, const void **edges, size_t *count) {
    ENTER;
    Result wrong = capture_status(s, status);
    if (wrong) RETURN(wrong);
    Capture *c = capture_of(s);
    if (id) *id = c ? c->id : 0;
    if (graph) *graph = c ? c->graph : NULL;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    RETURN(OK);
}

/* -- streams ------------------------------------------------------------------------------------- */

static Result make_stream(Stream **s, unsigned flags, int priority) {
    if (!current()) return INVALID_CONTEXT;
    *s = malloc(sizeof **s);
    **s = (Stream){current_device(), 1, priority, flags, NULL};
    return OK;
}
PUBLIC Result cuStreamCreate(Stream **s, unsigned flags) { ENTER; RETURN(make_stream(s, flags, 0)); }
PUBLIC Result cuStreamCreateWithPriority(Stream **s, unsigned flags, int priority) {
    ENTER;
    RETURN(make_stream(s, flags, priority));
}
PUBLIC Result cuStreamDestroy_v2(Stream *s) { ENTER; s->alive = 0; RETURN(OK); }
PUBLIC Result cuStreamGetCtx(Stream *s, Context **c) { ENTER; RETURN(context_of(s, c)); }
PUBLIC Result cuStreamGetCtx_v2(Stream *s, Context **c, void **green) {
    ENTER;
    if (green) *green = NULL;
    RETURN(context_of(s, c));
}
PUBLIC Result cuStreamGetDevice(Stream *s, int *d) {
    ENTER;
    Context *c;
    Result wrong = context_of(s, &c);
    if (!wrong) *d = c->device;
    RETURN(wrong);
}
PUBLIC Result cuStreamGetPriority(Stream *s, int *p) {
    ENTER;
    *p = numbered(s) ? 0 : s->priority;
    RETURN(OK);
}
PUBLIC Result cuStreamGetFlags(Stream *s, unsigned *f) { ENTER; *f = numbered(s) ? 0 : s->flags; RETURN(OK); }
PUBLIC Result cuStreamGetId(Stream *s, uint64_t *id) { ENTER; *id = (uintptr_t)s; RETURN(OK); }
PUBLIC Result cuStreamQuery(Stream *s) { ENTER; NOT_CAPTURED(s, CAPTURE_UNSUPPORTED); RETURN(OK); }
PUBLIC Result cuStreamWaitEvent(Stream *s, void *event, unsigned flags) {
    ENTER;
    NOT_CAPTURED(s, CAPTURE_ISOLATION);
    RETURN(OK);
}
PUBLIC Result cuStreamSynchronize(Stream *s) {
    ENTER;
    NOT_CAPTURED(s, CAPTURE_UNSUPPORTED);
    RETURN(OK);
}
PUBLIC Result cuCtxSynchronize(void) {
    ENTER;
    Result wrong = OK;
    for (Capture *c = captures; c; c = c->next) {
        if (c->stream->device != current_device()) continue;
        c->valid = 0;
        wrong = CAPTURE_UNSUPPORTED;
    }
    RETURN(wrong);
}
PUBLIC Result cuEventCreate(void **e, unsigned flags) { ENTER; *e = malloc(1); RETURN(OK); }
PUBLIC Result cuEventDestroy_v2(void *e) { ENTER; free(e); RETURN(OK); }
PUBLIC Result cuEventRecord(void *e, Stream *s) {
    ENTER;
    NOT_CAPTURED(s, CAPTURE_UNSUPPORTED);
    RETURN(OK);
}
PUBLIC Result cuEventQuery(void *e) { ENTER; RETURN(OK); }
PUBLIC Result cuEventSynchronize(void *e) { ENTER; RETURN(OK); }

/* -- memory --------------------------------------------------------------------------------------- */

typedef struct {
    Pointer address;
    size_t size;
    uintptr_t stream, freed_on;
    int pooled, freed, given; /* given: by a test, as its own array */
    const Graph *graph;       /* in which it is a node */
} Block;

static struct { Pointer base, next; Block *blocks; size_t count, room; } arenas[DEVICES];

static Result take(int device, size_t size, uintptr_t stream, int pooled, int given, Pointer *p) {
    __typeof__(arenas[0]) *a = &arenas[device];
    if (!size) return INVALID_VALUE;
    if (!a->base) {
        void *m = mmap(NULL, ARENA, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED) return OUT_OF_MEMORY;
        a->base = a->next = ((Pointer)m + 511) / 512 * 512;
    }
    size_t whole = (size + 511) / 512 * 512;
    if (whole < size || a->next + whole + 512 > a->base + ARENA) return OUT_OF_MEMORY;
    if (a->count == a->room) {
        a->room = 2 * a->room + 1024;
        a->blocks = realloc(a->blocks, a->room * sizeof *a->blocks);
        if (!a->blocks) abort();
    }
    a->blocks[a->count++] = (Block){a->next, size, stream, 0, pooled, 0, given, NULL};
    *p = a->next;
    a->next += whole;
    return OK;
}

static int device_of(Pointer p) {
    for (int d = 0; d < DEVICES; d++)
        if (arenas[d].base && p >= arenas[d].base && p < arenas[d].base + ARENA) return d;
    return -1;
}

/* The block, live or not, that an address lies in. Blocks are in the order of their addresses. */
static Block *block_of(Pointer p) {
    int d = device_of(p);
    if (d < 0) return NULL;
    Block *blocks = arenas[d].blocks;
    size_t low = 0, high = arenas[d].count;
    for (size_t near = 8; near < high && near < 4096; near *= 8) /* most are recent */
        if (blocks[high - near].address <= p) { low = high - near; break; }
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].address <= p) low = middle + 1; else high = middle;
    }
    Block *b = low ? &blocks[low - 1] : NULL;
    return b && p < b->address + b->size ? b : NULL;
}

static Result give_back(Pointer p, uintptr_t stream) {
    if (!p) return OK;
    Block *b = block_of(p);
    if (!b || b->address != p) { FAULT("free of %#llx, which is no block", p); return INVALID_VALUE; }
    if (b->freed) { FAULT("%#llx freed twice", p); return INVALID_VALUE; }
    b->freed = 1;
    b->freed_on = stream;
    return OK;
}

/* The graph to which what is queued on a stream belongs; NULL: it is done at once. */
static Graph *graph_of(Stream *s) { return capture_of(s) ? capture_of(s)->graph : NULL; }

struct Node {
    enum { KERNEL, ALLOC, FREE } kind;
    Pointer address; /* of memory */
    struct Launch *launch;
};

static void add_node(Graph *g, Node node) {
    if (g->count == g->room) {
        g->room = 2 * g->room + 16;
        g->nodes = realloc(g->nodes, g->room * sizeof *g->nodes);
        if (!g->nodes) abort();
    }
    g->nodes[g->count++] = node;
}

PUBLIC Result cuMemAlloc_v2(Pointer *p, size_t n) {
    ENTER;
    UNSAFE;
    if (!current()) RETURN(INVALID_CONTEXT);
    RETURN(take(current_device(), n, 0, 0, 0, p));
}
PUBLIC Result cuMemFree_v2(Pointer p) { ENTER; UNSAFE; RETURN(give_back(p, 0)); }

static Result take_async(int device, size_t n, Stream *s, Pointer *p) {
    Context *c;
    Result wrong = context_of(s, &c);
    if (wrong) return wrong;
    if (device < 0) device = c->device;
    if (c->device != device) FAULT("memory of device %d on a stream of device %d", device, c->device);
    if ((wrong = queue_on(s))) return wrong;
    Graph *graph = graph_of(s);
    wrong = take(device, n, (uintptr_t)s, 1, 0, p);
    if (wrong || !graph) return wrong;
    block_of(*p)->graph = graph;
    add_node(graph, (Node){ALLOC, *p, NULL});
    return OK;
}

static Result free_async(Pointer p, Stream *s) {
    Context *c;
    Result wrong = context_of(s, &c);
    if (wrong || (wrong = queue_on(s))) return wrong;
    Graph *graph = graph_of(s);
    if (graph) {
        Block *b = block_of(p);
        if (!b || b->graph != graph) {
            FAULT("%#llx freed in a graph that did not make it", p);
            capture_of(s)->valid = 0;
            return INVALID_VALUE;
        }
    }
    wrong = give_back(p, (uintptr_t)s);
    if (!wrong && graph) add_node(graph, (Node){FREE, p, NULL});
    return wrong;
}
PUBLIC Result cuMemAllocAsync(Pointer *p, size_t n, Stream *s) { ENTER; RETURN(take_async(-1, n, s, p)); }
PUBLIC Result cuMemAllocFromPoolAsync(Pointer *p, size_t n, Pool *pool, Stream *s) {
    ENTER;
    RETURN(take_async(pool->device, n, s, p));
}
PUBLIC Result cuMemFreeAsync(Pointer p, Stream *s) { ENTER; RETURN(free_async(p, s)); }
PUBLIC Result cuDeviceGetDefaultMemPool(Pool **p, int d) { ENTER; *p = &pools[d]; RETURN(OK); }
PUBLIC Result cuDeviceGetMemPool(Pool **p, int d) { ENTER; *p = &pools[d]; RETURN(OK); }
PUBLIC Result cuMemPoolGetAttribute(Pool *p, int a, uint64_t *v) { ENTER; UNSAFE; *v = 0; RETURN(OK); }
PUBLIC Result cuMemPoolSetAttribute(Pool *p, int a, uint64_t *v) { ENTER; UNSAFE; RETURN(OK); }
PUBLIC Result cuMemPoolDestroy(Pool *p) { ENTER; RETURN(OK); }
PUBLIC Result cuMemPoolGetAccess(int *flags, Pool *p, const int *location) {
    ENTER;
    *flags = location[1] == p->device ? 3 : 0;
    RETURN(OK);
}
PUBLIC Result cuMemGetInfo_v2(size_t *left, size_t *all) { ENTER; *left = *all = ARENA; RETURN(OK); }
PUBLIC Result cuMemGetAddressRange_v2(Pointer *base, size_t *n, Pointer p) {
    ENTER;
    Block *b = block_of(p);
    if (!b || b->freed) RETURN(INVALID_VALUE);
    if (base) *base = b->address;
    if (n) *n = b->size;
    RETURN(OK);
}
static Result pointer_attribute(void *to, int attribute, Pointer p) {
    Block *b = block_of(p);
    if (!b || b->freed) return INVALID_VALUE;
    int device = device_of(p);
    switch (attribute) {
    case 1: *(void **)to = b->pooled ? NULL : &contexts[device]; break;
    case 2: *(unsigned *)to = 2; break; /* device memory */
    case 3: *(Pointer *)to = p; break;
    case 4: return INVALID_VALUE; /* its address on the host */
    case 8: *(unsigned *)to = 0; break; /* managed */
    case 9: *(int *)to = device; break;
    case 11: *(Pointer *)to = b->address; break;
    case 12: *(size_t *)to = b->size; break;
    case 17: *(void **)to = b->pooled ? &pools[device] : NULL; break;
    default: return INVALID_VALUE;
    }
    return OK;
}
PUBLIC Result cuPointerGetAttribute(void *to, int attribute, Pointer p) {
    ENTER;
    RETURN(pointer_attribute(to, attribute, p));
}
PUBLIC Result cuPointerGetAttributes(unsigned n, int *attributes, void **to, Pointer p) {
    ENTER;
    for (unsigned i = 0; i < n; i++) { /* no error for what is not the driver's: zeros */
        if (!pointer_attribute(to[i], attributes[i], p)) continue;
        if (attributes[i] == 9) *(int *)to[i] = -2;
        else if (attributes[i] == 2 || attributes[i] == 8) *(unsigned *)to[i] = 0;
        else *(Pointer *)to[i] = 0;
    }
    RETURN(OK);
}

#define COPY(name, more) \
    PUBLIC Result name(Pointer a, Pointer b, size_t n more) { \
        ENTER; CHECKED; memcpy((void *)a, (void *)b, n); RETURN(OK); }
#define ON_STREAM , Stream *s
#define CHECKED UNSAFE
COPY(cuMemcpyHtoD_v2, )
COPY(cuMemcpyDtoH_v2, )
COPY(cuMemcpyDtoD_v2, )
COPY(cuMemcpy, )
#undef CHECKED
#define CHECKED NOT_CAPTURED(s, CAPTURE_UNSUPPORTED) /* no node of ours */
COPY(cuMemcpyHtoDAsync_v2, ON_STREAM)
COPY(cuMemcpyDtoHAsync_v2, ON_STREAM)
COPY(cuMemcpyDtoDAsync_v2, ON_STREAM)
COPY(cuMemcpyAsync, ON_STREAM)

/* -- kernels -------------------------------------------------------------------------------------- */

typedef struct { char name[512]; int major, minor, arguments; } Kernel;

/* The architecture for which a cubin was made. */
static void architecture(const Elf64_Ehdr *elf, Kernel *k) {
    unsigned flags = elf->e_flags;
    unsigned sm = elf->e_ident[EI_ABIVERSION] >= 8 ? flags >> 8 & 0xff : flags & 0xff;
    k->major = sm / 10;
    k->minor = sm % 10;
}

/* The number of 64-bit parameters, from the notes on a kernel: (form, name, size or value), data. */
static int parameters(const unsigned char *p, size_t n) {
    for (const unsigned char *end = p + n; p + 4 <= end;) {
        unsigned form = p[0], name = p[1], size = p[2] | p[3] << 8;
        if (name == 0x19) return size / 8; /* PARAM_SIZE */
        p += 4 + (form == 4 ? size : 0);
    }
    return -1;
}

PUBLIC Result cuLibraryLoadData(Kernel **library, const void *image, void *a, void *b, unsigned n,
                                void *c, void *d, unsigned m) {
    ENTER;
    UNSAFE;
    const Elf64_Ehdr *elf = image;
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG)) RETURN(INVALID_IMAGE);
    const char *bytes = image;
    const Elf64_Shdr *sections = (const void *)(bytes + elf->e_shoff);
    const char *names = bytes + sections[elf->e_shstrndx].sh_offset;
    Kernel *k = calloc(1, sizeof *k);
    k->arguments = -1;
    architecture(elf, k);
    for (int i = 0; i < elf->e_shnum; i++) {
        const char *name = names + sections[i].sh_name;
        if (strncmp(name, ".nv.info._Z", 11)) continue;
        snprintf(k->name, sizeof k->name, "%s", name + 9);
        k->arguments = parameters((const void *)(bytes + sections[i].sh_offset), sections[i].sh_size);
    }
    if (k->arguments < 0 || k->arguments > MAX_ARGUMENTS) RETURN(INVALID_IMAGE);
    *library = k;
    RETURN(OK);
}
PUBLIC Result cuLibraryUnload(Kernel *k) { ENTER; UNSAFE; RETURN(OK); }
PUBLIC Result cuLibraryGetKernel(Kernel **k, Kernel *library, const char *name) {
    ENTER;
    if (strcmp(name, library->name)) RETURN(NOT_FOUND);
    *k = library;
    RETURN(OK);
}
PUBLIC Result cuKernelGetLibrary(Kernel **library, Kernel *k) { ENTER; *library = k; RETURN(OK); }
PUBLIC Result cuKernelGetFunction(Kernel **f, Kernel *k) { ENTER; *f = k; RETURN(OK); }
PUBLIC Result cuKernelGetAttribute(int *v, int attribute, Kernel *k, int d) { ENTER; *v = 32; RETURN(OK); }
PUBLIC Result cuKernelGetParamInfo(Kernel *k, size_t i, size_t *offset, size_t *size) {
    ENTER;
    if (i >= (size_t)k->arguments) RETURN(INVALID_VALUE);
    *offset = 8 * i;
    if (size) *size = 8;
    RETURN(OK);
}

typedef struct { int id; char pad[4]; union { char bytes[64]; struct { unsigned x, y, z; } dim; } value; } Attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    Stream *stream;
    Attribute *attributes;
    unsigned count;
} Config;
#define CLUSTER_DIMENSION 4

struct Launch {
    Config config;
    unsigned cluster;
    int device;
    Kernel *kernel;
    const Graph *graph;
    Pointer values[MAX_ARGUMENTS];
};

/* A kernel runs, as far as it does here. */
static void run(const struct Launch *l) {
    if (!recording) return;
    Text *t = &launches;
    const unsigned *g = l->config.grid, *b = l->config.block;
    append(t, "%s{\"kernel\":\"%s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"cluster\":%u,",
           t->size ? "," : "", l->kernel->name, g[0], g[1], g[2], b[0], b[1], b[2], l->cluster);
    append(t, "\"stream\":%llu,\"device\":%d,\"current\":%d,\"thread\":%ld,\"arguments\":[",
           (Pointer)l->config.stream, l->device, current_device(), this_thread());
    for (int i = 0; i < l->kernel->arguments; i++) {
        Pointer value = l->values[i];
        append(t, "%s%lld", i ? "," : "", (long long)value);
        int d = device_of(value);
        if (d >= 0 && d != l->device) FAULT("work on device %d, memory of device %d", l->device, d);
        Block *block = d < 0 ? NULL : block_of(value);
        if (block && block->freed) FAULT("a kernel is given freed memory");
        if (block && block->graph && block->graph != l->graph) FAULT("memory of another graph");
    }
    append(t, "]}");
}

static Result launch(const Config *config, Kernel *k, void **arguments) {
    Context *c;
    Result wrong = context_of(config->stream, &c);
    if (wrong || (wrong = queue_on(config->stream))) return wrong;
    const unsigned *g = config->grid, *b = config->block;
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->count; i++)
        if (config->attributes[i].id == CLUSTER_DIMENSION) cluster = config->attributes[i].value.dim.x;
    if (!g[0] || !g[1] || !g[2] || !b[0] || !b[1] || !b[2]) return INVALID_VALUE;
    if (g[0] > 2147483647u || g[1] > 65535 || g[2] > 65535) return INVALID_VALUE;
    if ((uint64_t)b[0] * b[1] * b[2] > 1024) return INVALID_VALUE;
    if (cluster > 8 || g[0] % cluster) return INVALID_CLUSTER_SIZE;
    const int *has = capability[c->device];
    if (cluster > 1 && has[0] < 9) return INVALID_VALUE;
    if (k->major != has[0] || k->minor > has[1]) return NO_BINARY_FOR_GPU;
    struct Launch l = {*config, cluster, c->device, k, graph_of(config->stream), {0}};
    for (int i = 0; i < k->arguments; i++) l.values[i] = *(Pointer *)arguments[i];
    if (l.graph) {
        struct Launch *kept = malloc(sizeof *kept);
        *kept = l;
        add_node(graph_of(config->stream), (Node){KERNEL, 0, kept});
    } else run(&l);
    return OK;
}
PUBLIC Result cuLaunchKernelEx(const Config *config, Kernel *k, void **arguments, void **extra) {
    ENTER;
    RETURN(launch(config, k, arguments));
}
PUBLIC Result cuLaunchKernel(Kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                             unsigned bz, unsigned shared, Stream *s, void **arguments, void **extra) {
    ENTER;
    Config config = {{gx, gy, gz}, {bx, by, bz}, shared, s, NULL, 0};
    RETURN(launch(&config, k, arguments));
}

/* -- graphs, each of which is its own executable one ------------------------------------------------- */

PUBLIC Result cuStreamEndCapture(Stream *s, Graph **graph) {
    ENTER;
    *graph = NULL;
    Capture *c = capture_of(s);
    if (!c) RETURN(ILLEGAL_STATE);
    if (c->mode != RELAXED && c->thread != this_thread()) {
        c->valid = 0;
        RETURN(CAPTURE_WRONG_THREAD);
    }
    Capture **place = &captures;
    while (*place != c) place = &(*place)->next;
    *place = c->next;
    c->stream->capture = NULL;
    for (size_t i = 0; i < c->graph->count; i++) /* nothing was made yet */
        if (c->graph->nodes[i].kind == ALLOC) block_of(c->graph->nodes[i].address)->freed = 1;
    if (c->valid) *graph = c->graph;
    RETURN(c->valid ? OK : CAPTURE_INVALIDATED);
}
PUBLIC Result cuGraphDestroy(Graph *g) { ENTER; RETURN(OK); }
PUBLIC Result cuGraphInstantiateWithParams(Graph **exec, Graph *g, void *parameters) {
    ENTER;
    *exec = g;
    RETURN(OK);
}
PUBLIC Result cuGraphRetainUserObject(Graph *g, void *o, unsigned n, unsigned f) { ENTER; RETURN(OK); }
PUBLIC Result cuGraphReleaseUserObject(Graph *g, void *o, unsigned n) { ENTER; RETURN(OK); }
PUBLIC Result cuUserObjectCreate(void **o, void *p, void *destroy, unsigned n, unsigned f) {
    ENTER;
    *o = p;
    RETURN(OK);
}
PUBLIC Result cuUserObjectRelease(void *o, unsigned n) { ENTER; RETURN(OK); }
PUBLIC Result cuGraphExecDestroy(Graph *g) { ENTER; RETURN(OK); }
PUBLIC Result cuGraphLaunch(Graph *g, Stream *s) {
    ENTER;
    NOT_CAPTURED(s, CAPTURE_UNSUPPORTED); /* no node of ours */
    for (Node *node = g->nodes; node < g->nodes + g->count; node++) {
        Block *b = node->kind == KERNEL ? NULL : block_of(node->address);
        if (node->kind == ALLOC) {
            if (!b->freed) RETURN(INVALID_VALUE); /* of the launch before */
            b->freed = 0;
        } else if (node->kind == FREE) {
            give_back(node->address, (uintptr_t)s);
        } else {
            struct Launch l = *node->launch;
            l.config.stream = s;
            run(&l);
        }
    }
    RETURN(OK);
}

/* -- names ---------------------------------------------------------------------------------------- */

PUBLIC Result cuGetErrorName(int code, const char **s) {
    switch (code) {
    case OUT_OF_MEMORY: *s = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *s = "CUDA_ERROR_NO_DEVICE"; break;
    case LAUNCH_FAILED: *s = "CUDA_ERROR_LAUNCH_FAILED"; break;
    default: *s = "CUDA_ERROR"; break;
    }
    return OK;
}
PUBLIC Result cuGetErrorString(int code, const char **s) { return cuGetErrorName(code, s); }
PUBLIC Result cuGetExportTable(const void **table, const void *id) { return NOT_FOUND; }

PUBLIC Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                                  int *status) {
    static const struct { const char *name; int version; } second[] = {
        {"cuStreamGetCtx", 12050}, {"cuCtxGetDevice", 13000}, {"cuDeviceGetUuid", 11040},
        {"cuDeviceTotalMem", 3020}, {"cuDevicePrimaryCtxRelease", 11000},
        {"cuCtxPushCurrent", 4000}, {"cuCtxPopCurrent", 4000}, {"cuStreamDestroy", 4000},
        {"cuEventDestroy", 4000}, {"cuMemAlloc", 3020}, {"cuMemFree", 3020},
        {"cuStreamBeginCapture", 10010},
        {"cuMemGetInfo", 3020}, {"cuMemGetAddressRange", 3020}, {"cuMemcpyHtoD", 3020},
        {"cuMemcpyDtoH", 3020}, {"cuMemcpyDtoD", 3020}, {"cuMemcpyHtoDAsync", 3020},
        {"cuMemcpyDtoHAsync", 3020}, {"cuMemcpyDtoDAsync", 3020}, {"cuGetProcAddress", 12000},
    };
    static void *self;
    char symbol[128];
    pthread_mutex_lock(&lock);
    if (!self) {
        Dl_info info;
        dladdr((void *)cuInit, &info);
        self = dlopen(info.dli_fname, RTLD_LAZY);
    }
    snprintf(symbol, sizeof symbol, "%s", name);
    for (size_t i = 0; i < sizeof second / sizeof *second; i++)
        if (!strcmp(name, second[i].name) && version >= second[i].version)
            snprintf(symbol, sizeof symbol, "%s_v2", name);
    if (!strcmp(name, "cuStreamGetCaptureInfo") && version >= 12030)
        snprintf(symbol, sizeof symbol, "%s_v3", name);
    *function = strncmp(name, "cu", 2) ? NULL : dlsym(self, symbol);
    if (status) *status = *function ? 0 : 1;
    pthread_mutex_unlock(&lock);
    return *function ? OK : NOT_FOUND;
}
PUBLIC Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

/* -- for tests ------------------------------------------------------------------------------------ */

/* Memory that a test calls its own array, made by whoever has initialized the driver. */
PUBLIC Pointer fake_memory(int device, size_t size) {
    Pointer p = 0;
    if (cuInit(0)) return 0;
    pthread_mutex_lock(&lock);
    take(device, size, 0, 0, 1, &p);
    pthread_mutex_unlock(&lock);
    return p;
}

/* Let the n-th call of a function from now on fail; every one for n = 0, none for code 0. */
PUBLIC void fake_fail(const char *name, long n, int code) {
    pthread_mutex_lock(&lock);
    snprintf(failing.name, sizeof failing.name, "%s", name);
    failing.left = n; failing.code = code; failing.always = n == 0;
    pthread_mutex_unlock(&lock);
}

/* Whether launches are recorded: a benchmark wants no list of them. */
PUBLIC void fake_record(int on) { recording = on; }

/* Forget all calls and launches, and the blocks that were freed. Others stay. */
PUBLIC void fake_clear(void) {
    pthread_mutex_lock(&lock);
    for (Counter *c = counters; c; c = c->next == c ? NULL : c->next) c->count = 0;
    for (int d = 0; d < DEVICES; d++) {
        size_t kept = 0;
        for (size_t i = 0; i < arenas[d].count; i++)
            if (!arenas[d].blocks[i].freed || arenas[d].blocks[i].graph)
                arenas[d].blocks[kept++] = arenas[d].blocks[i];
        arenas[d].count = kept;
    }
    forget(&launches);
    forget(&faults);
    pthread_mutex_unlock(&lock);
}

/* All that was done since then, as JSON. */
PUBLIC const char *fake_records(void) {
    pthread_mutex_lock(&lock);
    Text *t = &report;
    forget(t);
    append(t, "{\"launches\":[%s],\"faults\":[%s],", launches.size ? launches.text : "",
           faults.size ? faults.text : "");
    append(t, "\"calls\":{");
    const char *comma = "";
    for (Counter *c = counters; c; c = c->next == c ? NULL : c->next) {
        if (c->count) { append(t, "%s\"%s\":%ld", comma, c->name, c->count); comma = ","; }
    }
    append(t, "},\"blocks\":[");
    comma = "";
    for (int d = 0; d < DEVICES; d++)
        for (size_t i = 0; i < arenas[d].count; i++) {
            Block *b = &arenas[d].blocks[i];
            if (b->given) continue;
            append(t, "%s{\"address\":%llu,\"size\":%zu,\"device\":%d,\"stream\":%llu,", comma,
                   b->address, b->size, d, (Pointer)b->stream);
            append(t, "\"graph\":%llu,", (Pointer)b->graph);
            append(t, b->freed ? "\"freed_on\":%llu}" : "\"freed_on\":null}", (Pointer)b->freed_on);
            comma = ",";
        }
    append(t, "]}");
    pthread_mutex_unlock(&lock);
    return t->text;
}
