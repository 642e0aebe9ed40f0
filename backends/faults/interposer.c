/* Refuses the Nth allocation of a process, and counts what it asks for: put under it with LD_PRELOAD.
 *
 * What to refuse, and what was counted, is in a file that every process of a run maps (PLIMSOLL_INTERPOSER; its layout
 * is struct control, and backends/faults/interposer.py writes it): so a plan reaches a worker, a SIGKILL loses no count,
 * and who arms needs no memory for it. Without the file, and while nothing is armed, each call costs one load.
 *
 * Host: malloc, calloc, realloc, posix_memalign, aligned_alloc, memalign, mmap, mmap64, mremap. CUDA runtime, where it
 * is linked dynamically: cudaMalloc and its variants, and kernel launches. Writes and fsync are counted, never refused.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x4d494c50u
#define VERSION 1u
#define FRAMES 16
#define FRAME_BYTES 192
#define PROCESSES 128

enum { HEAP = 1, MAP = 2, DEVICE = 4, LAUNCH = 8 };
enum { ARMED = 1, REPORT = 2 };
enum { ANY_THREAD, MAIN_THREAD, OTHER_THREADS, NAMED_THREAD, NOT_NAMED_THREAD };
enum { CUDA_OUT_OF_MEMORY = 2, CUDA_INITIALIZATION_ERROR = 3, CUDA_LAUNCH_FAILURE = 719 };

struct process {
    _Atomic int32_t id;
    _Atomic uint32_t reported;
    _Atomic uint64_t heap_bytes;
    /* Writes and syncs of the process in order, and the place of the main thread's last of each. */
    _Atomic uint64_t sequence, syncs, main_wrote, main_synced;
    uint64_t unused[2];
};

struct control {
    uint32_t magic, version;
    _Atomic uint32_t wake;
    uint32_t unused;
    int64_t deadline_ns;
    uint64_t sites, min_bytes, nth, times;
    int32_t process, thread;
    char thread_name[16];
    /* Only this executable is a process of the run (0: any). */
    uint64_t executable_device, executable_inode;
    _Atomic uint64_t seen, fired;
    /* With times 0 the first process in which the fault fires is the only one. */
    _Atomic int32_t bound;
    _Atomic uint32_t report;
    /* About the first that fired. */
    int32_t fired_process, fired_thread;
    uint64_t fired_site, fired_bytes;
    _Atomic uint32_t frames;
    uint32_t unused_too;
    char frame[FRAMES][FRAME_BYTES];
    struct process processes[PROCESSES];
};

/* The C library's own, under names that nothing else takes: no look-up, which would itself allocate. */
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);
/* Newer ones refuse odd alignments. It has no such name. */
static void *(*libc_aligned_alloc)(size_t, size_t) = __libc_memalign;

static struct control nothing;
static struct control *control = &nothing;
static struct process nobody;
static struct process *self = &nobody;
static __thread int inside __attribute__((tls_model("initial-exec")));
static __thread int32_t thread_id __attribute__((tls_model("initial-exec")));
/* getpid is a call of the kernel, and this is asked at each request while a fault is armed. */
static int32_t process_id;

static int32_t current_thread(void) {
    if (!thread_id)
        thread_id = (int32_t)syscall(SYS_gettid);
    return thread_id;
}

static int is_main_thread(void) { return current_thread() == process_id; }

/* Find a place in the table: the one from before an exec, or one of nobody, or of a process that is gone. */
static struct process *place_of(int32_t mine) {
    for (int i = 0; i < PROCESSES; i++)
        if (atomic_load(&control->processes[i].id) == mine)
            return &control->processes[i];
    for (int i = 0; i < PROCESSES; i++) {
        struct process *each = &control->processes[i];
        int32_t theirs = atomic_load(&each->id);
        if (theirs && !(kill(theirs, 0) && errno == ESRCH))
            continue;
        if (atomic_compare_exchange_strong(&each->id, &theirs, mine))
            return each;
    }
    return &nobody;
}

static void enter(void) {
    thread_id = 0;
    process_id = getpid();
    struct process *place = control == &nothing ? &nobody : place_of(process_id);
    if (place != &nobody) {
        atomic_store(&place->reported, 0);
        atomic_store(&place->heap_bytes, 0);
        atomic_store(&place->sequence, 0);
        atomic_store(&place->syncs, 0);
        atomic_store(&place->main_wrote, 0);
        atomic_store(&place->main_synced, 0);
    }
    self = place;
}

/* Not getenv and its like: a program may have its own (bash does), and memory is not needed. */
static char **variable(const char *name) {
    size_t length = strlen(name);
    for (char **each = environ; each && *each; each++)
        if (!strncmp(*each, name, length) && (*each)[length] == '=')
            return each;
    return NULL;
}

static char *value_of(char **variable) { return variable ? strchr(*variable, '=') + 1 : NULL; }

static void take_out(char **variable) {
    for (; variable && *variable; variable++)
        variable[0] = variable[1];
}

/* Have what this process starts know nothing of the run. */
static void leave_environment(void) {
    Dl_info own;
    take_out(variable("PLIMSOLL_INTERPOSER"));
    char **preload = variable("LD_PRELOAD"), *all = value_of(preload), *kept = all;
    if (!all || !dladdr((void *)leave_environment, &own))
        return;
    for (char *each = all, *next; *each; each = next) {
        size_t length = strcspn(each, ": ");
        next = each + length + (each[length] != 0);
        if (!length || (length == strlen(own.dli_fname) && !memcmp(each, own.dli_fname, length)))
            continue;
        if (kept != all)
            *kept++ = ':';
        memmove(kept, each, length);
        kept += length;
    }
    *kept = 0;
    if (kept == all)
        take_out(preload);
}

__attribute__((constructor)) static void begin(void) {
    struct stat its;
    void *frame[1];
    const char *path = value_of(variable("PLIMSOLL_INTERPOSER"));
    void *aligned = dlvsym(RTLD_NEXT, "aligned_alloc", "GLIBC_2.16");
    if (aligned)
        libc_aligned_alloc = (void *(*)(size_t, size_t))aligned;
    int descriptor = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return;
    void *mapped = MAP_FAILED;
    if (!fstat(descriptor, &its) && its.st_size >= (off_t)sizeof(struct control))
        mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (mapped == MAP_FAILED)
        return;
    struct control *found = mapped;
    int is_ours = found->magic == MAGIC && found->version == VERSION;
    if (is_ours && found->executable_inode)
        is_ours = !stat("/proc/self/exe", &its) && its.st_ino == found->executable_inode &&
                  its.st_dev == found->executable_device;
    if (!is_ours) {
        munmap(mapped, sizeof(struct control));
        leave_environment();
        return;
    }
    /* The unwinder loads a library when it is first used. */
    backtrace(frame, 1);
    control = found;
    enter();
    pthread_atfork(NULL, NULL, enter);
}

/* Say where the request came from. Nothing here is counted, or refused. */
static void note_place(uint64_t site, size_t bytes) {
    void *address[FRAMES + 4];
    Dl_info own, its;
    control->fired_process = process_id;
    control->fired_thread = current_thread();
    control->fired_site = site;
    control->fired_bytes = bytes;
    int found = backtrace(address, FRAMES + 4), kept = 0;
    int knows_own = dladdr((void *)note_place, &own);
    for (int i = 0; i < found && kept < FRAMES; i++) {
        if (!dladdr(address[i], &its) || !its.dli_fname) {
            snprintf(control->frame[kept++], FRAME_BYTES, "%p", address[i]);
            continue;
        }
        if (knows_own && its.dli_fbase == own.dli_fbase)
            continue;
        const char *name = strrchr(its.dli_fname, '/');
        snprintf(control->frame[kept++], FRAME_BYTES, "%s+0x%tx %s", name ? name + 1 : its.dli_fname,
                 (char *)address[i] - (char *)its.dli_fbase, its.dli_sname ? its.dli_sname : "");
    }
    atomic_store(&control->frames, kept);
}

static int is_meant(void) {
    char name[16];
    int32_t process = control->process;
    if (process > 0 ? process != process_id : process < 0 && -process == process_id)
        return 0;
    switch (control->thread) {
    case MAIN_THREAD:
        return is_main_thread();
    case OTHER_THREADS:
        return !is_main_thread();
    case NAMED_THREAD:
    case NOT_NAMED_THREAD:
        if (prctl(PR_GET_NAME, name))
            return 0;
        return !strncmp(name, control->thread_name, 15) == (control->thread == NAMED_THREAD);
    }
    return 1;
}

static int is_over(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec >= control->deadline_ns;
}

static void report(void) {
    uint32_t wanted = atomic_load(&control->report);
    if (self == &nobody || atomic_load(&self->reported) == wanted)
        return;
    struct mallinfo2 heap = mallinfo2();
    atomic_store(&self->heap_bytes, heap.uordblks + heap.hblkhd);
    atomic_store(&self->reported, wanted);
}

static int strike(uint64_t site, size_t bytes) {
    /* A launch asks for no bytes. */
    if (!(control->sites & site) || (site != LAUNCH && bytes < control->min_bytes) || !is_meant() || is_over())
        return 0;
    int32_t mine = process_id, bound = atomic_load(&control->bound);
    if (bound && bound != mine)
        return 0;
    uint64_t place = atomic_fetch_add(&control->seen, 1) + 1;
    if (place < control->nth || (control->times && place >= control->nth + control->times))
        return 0;
    if (!control->times && !atomic_compare_exchange_strong(&control->bound, &bound, mine) && bound != mine)
        return 0;
    if (!atomic_fetch_add(&control->fired, 1))
        note_place(site, bytes);
    return 1;
}

/* For Python: what brings about a fault of another kind in this thread is no point of the subject's. */
void plimsoll_uncounted(int change) { inside += change; }

static __attribute__((noinline)) int look(uint32_t wake, uint64_t site, size_t bytes) {
    if (inside)
        return 0;
    int kept = errno, refuses;
    inside++;
    if (wake & REPORT)
        report();
    refuses = wake & ARMED && strike(site, bytes);
    inside--;
    errno = refuses && site & (HEAP | MAP) ? ENOMEM : kept;
    return refuses;
}

static inline int refused(uint64_t site, size_t bytes) {
    uint32_t wake = atomic_load_explicit(&control->wake, memory_order_relaxed);
    return __builtin_expect(wake != 0, 0) && look(wake, site, bytes);
}

/* Host memory. */

void *malloc(size_t bytes) { return refused(HEAP, bytes) ? NULL : __libc_malloc(bytes); }

void *calloc(size_t count, size_t bytes) {
    size_t all;
    /* An overflow is the C library's to refuse. */
    if (!__builtin_mul_overflow(count, bytes, &all) && refused(HEAP, all))
        return NULL;
    return __libc_calloc(count, bytes);
}

void *realloc(void *old, size_t bytes) {
    /* Of no bytes it is a free. */
    return bytes && refused(HEAP, bytes) ? NULL : __libc_realloc(old, bytes);
}

/* Never refused. Here so that what is given comes back, also where a program is linked to another allocator. */
void free(void *old) { __libc_free(old); }

void *memalign(size_t alignment, size_t bytes) {
    return refused(HEAP, bytes) ? NULL : __libc_memalign(alignment, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes) {
    return refused(HEAP, bytes) ? NULL : libc_aligned_alloc(alignment, bytes);
}

int posix_memalign(void **given, size_t alignment, size_t bytes) {
    if (alignment % sizeof(void *) || !alignment || (alignment & (alignment - 1)))
        return EINVAL;
    if (refused(HEAP, bytes))
        return ENOMEM;
    void *made = __libc_memalign(alignment, bytes);
    if (!made)
        return ENOMEM;
    *given = made;
    return 0;
}

void *mmap(void *where, size_t bytes, int protection, int flags, int descriptor, off_t offset) {
    if (refused(MAP, bytes))
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, where, bytes, protection, flags, descriptor, offset);
}

void *mmap64(void *where, size_t bytes, int protection, int flags, int descriptor, off64_t offset) {
    return mmap(where, bytes, protection, flags, descriptor, offset);
}

void *mremap(void *old, size_t old_bytes, size_t bytes, int flags, ...) {
    va_list more;
    va_start(more, flags);
    void *where = flags & ~MREMAP_MAYMOVE ? va_arg(more, void *) : NULL;
    va_end(more);
    /* Less is always to be had. */
    if (bytes > old_bytes && refused(MAP, bytes))
        return MAP_FAILED;
    return (void *)syscall(SYS_mremap, old, old_bytes, bytes, flags, where);
}

/* What makes data durable. */

static ssize_t wrote(int descriptor, ssize_t bytes) {
    struct stat its;
    /* Not what goes to a pipe, a socket or a terminal: no sync makes that durable. */
    if (bytes > 0 && self != &nobody && !fstat(descriptor, &its) && S_ISREG(its.st_mode)) {
        uint64_t place = atomic_fetch_add(&self->sequence, 1) + 1;
        if (is_main_thread())
            atomic_store(&self->main_wrote, place);
    }
    return bytes;
}

static int synced(int failed) {
    if (!failed && self != &nobody) {
        uint64_t place = atomic_fetch_add(&self->sequence, 1) + 1;
        atomic_fetch_add(&self->syncs, 1);
        if (is_main_thread())
            atomic_store(&self->main_synced, place);
    }
    return failed;
}

ssize_t write(int descriptor, const void *data, size_t bytes) {
    return wrote(descriptor, syscall(SYS_write, descriptor, data, bytes));
}

ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t offset) {
    return wrote(descriptor, syscall(SYS_pwrite64, descriptor, data, bytes, offset));
}

ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off64_t offset) {
    return wrote(descriptor, syscall(SYS_pwrite64, descriptor, data, bytes, offset));
}

int fsync(int descriptor) { return synced((int)syscall(SYS_fsync, descriptor)); }

int fdatasync(int descriptor) { return synced((int)syscall(SYS_fdatasync, descriptor)); }

/* The CUDA runtime. */

struct dim3 {
    unsigned x, y, z;
};

static int is_cudart(struct dl_phdr_info *info, size_t size, void *found) {
    (void)size;
    const char *slash = strrchr(info->dlpi_name, '/'), *name = slash ? slash + 1 : info->dlpi_name;
    /* A wheel may have its own, with a digest in its name. */
    if (strncmp(name, "libcudart.so", 12) && strncmp(name, "libcudart-", 10))
        return 0;
    *(const char **)found = info->dlpi_name;
    return 1;
}

/* The runtime is loaded privately, as a Python extension's library is: the next in the search order is not it. */
static void *runtime(const char *name) {
    const char *path = NULL;
    dl_iterate_phdr(is_cudart, &path);
    void *library = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    return library ? dlsym(library, name) : NULL;
}

/* As the runtime has it: what was refused in this thread and not asked for yet. */
static __thread int last_error __attribute__((tls_model("initial-exec")));

#define CUDA(name, refuses, declared, given)                                                                          \
    int name declared {                                                                                               \
        static _Atomic(void *) found;                                                                                 \
        refuses;                                                                                                      \
        if (!atomic_load(&found))                                                                                     \
            atomic_store(&found, runtime(#name));                                                                     \
        int(*real) declared = (int(*) declared)atomic_load(&found);                                                   \
        return real ? real given : CUDA_INITIALIZATION_ERROR;                                                         \
    }
#define REFUSE(site, bytes, error)                                                                                    \
    if (refused(site, bytes))                                                                                         \
    return last_error = error
#define CUDA_MEMORY(name, declared, given) CUDA(name, REFUSE(DEVICE, bytes, CUDA_OUT_OF_MEMORY), declared, given)
#define CUDA_LAUNCH(name, declared, given) CUDA(name, REFUSE(LAUNCH, 0, CUDA_LAUNCH_FAILURE), declared, given)

CUDA_MEMORY(cudaMalloc, (void **made, size_t bytes), (made, bytes))
CUDA_MEMORY(cudaMallocAsync, (void **made, size_t bytes, void *stream), (made, bytes, stream))
CUDA_MEMORY(cudaMallocFromPoolAsync, (void **made, size_t bytes, void *pool, void *stream), (made, bytes, pool, stream))
CUDA_MEMORY(cudaMallocHost, (void **made, size_t bytes), (made, bytes))
CUDA_MEMORY(cudaHostAlloc, (void **made, size_t bytes, unsigned flags), (made, bytes, flags))

CUDA_LAUNCH(cudaLaunchKernel,
            (const void *kernel, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *stream),
            (kernel, grid, block, arguments, shared, stream))
CUDA_LAUNCH(cudaLaunchKernelExC, (const void *configuration, const void *kernel, void **arguments),
            (configuration, kernel, arguments))

/* What kernel<<<...>>> returns is lost: whoever launches that way asks here. */
static int taken_error(void) {
    int taken = last_error;
    last_error = 0;
    return taken;
}
CUDA(cudaPeekAtLastError, if (last_error) return last_error, (void), ())
CUDA(cudaGetLastError, if (last_error) return taken_error(), (void), ())
