/* The team: OpenMP's threads, which work on the jobs of whoever has some.
 *
 * A parallel region of OpenMP's own belongs to the thread that opens it, wakes threads that sleep,
 * and ends when all of them have come and gone. TensorFlow would open hundreds a step, on several
 * threads at once. So the workers stay in one region for good (threads.pxi opens it), and are given
 * jobs here:
 *
 *   - A job is tasks 0 .. n - 1, which its owner and the workers that join take one by one. The
 *     owner waits for workers that are inside at the end, never for one that has not come.
 *   - A worker joins while fewer threads have a job, owners and workers together, than the team has
 *     threads, and leaves after its task where an owner has come that is one too many.
 *   - A worker without a job watches for the next one before it sleeps: most ops are followed by
 *     another one at once. A job wakes two workers, and each of these two more, as far as needed.
 *   - A thread that begins a task on a CPU where another one works moves to one where none does.
 *
 * ResNet-20's step took 164 ms on 2 cores with a region a job, 136 so; 143 without the last point,
 * 139 without watching.
 */
#ifndef DFP_TEAM_H
#define DFP_TEAM_H

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    DFP_MOST_THREADS = 1024,
    DFP_PATIENCE = 100000, /* nanoseconds of watching; to wake a thread takes about 50000 */
    DFP_STAY = 100000000,  /* without moves, after one that took longer than that */
};

typedef void (*dfp_task)(void *work, int64_t index, int thread);
/* Opens a region of `count` threads, in which dfp_serve runs for workers from `first` on. */
typedef void (*dfp_region)(int first, int count);

typedef struct dfp_job {
    dfp_task task;
    void *work;
    int64_t n, next;
    int threads; /* that may work on it: 0 is its owner */
    int limit;   /* to threads at work at once, on this job and others */
    int inside;  /* workers, */
    uint64_t numbers[DFP_MOST_THREADS / 64]; /* and theirs */
    pthread_cond_t left;
    struct dfp_job *after;
} dfp_job;

static struct {
    pthread_mutex_t lock; /* for all below */
    dfp_job *jobs;  /* that may have tasks left, the oldest first */
    int running __attribute__((aligned(64))); /* threads that have a job */
    int waiting;    /* workers that watch, or are about to: woken, but not yet awake */
    int size;       /* threads, with an owner: the workers are 1 .. size - 1 */
    unsigned calls; /* a job came, or a thread became free for one */
    dfp_region region;
    int forked;     /* a forked child has no workers */
    struct {
        pthread_cond_t called;
        int asleep;
    } worker[DFP_MOST_THREADS];
} dfp_team = {.lock = PTHREAD_MUTEX_INITIALIZER, .size = 1};

/* What is also read without the lock. */
#define DFP_READ(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define DFP_WRITE(x, value) __atomic_store_n(&(x), value, __ATOMIC_RELAXED)

/* TensorFlow's threads flush subnormals, the workers do not: every task runs with the default
 * floating-point environment, so that results do not depend on the thread. */
typedef unsigned long float_env;
#if defined(__x86_64__)
static inline float_env dfp_float_default(void) {
    float_env old = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return old;
}
static inline void dfp_float_restore(float_env old) {
    _mm_sfence();           /* streamed results are visible before the job ends */
    _mm_setcsr((unsigned)old);
}
#elif defined(__aarch64__)
static inline float_env dfp_float_default(void) {
    float_env old;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(old));
    __asm__ __volatile__("msr fpcr, %0" :: "r"(0ul));
    return old;
}
static inline void dfp_float_restore(float_env old) {
    __asm__ __volatile__("msr fpcr, %0" :: "r"(old));
}
#else
static inline float_env dfp_float_default(void) { return 0; }
static inline void dfp_float_restore(float_env old) { (void)old; }
#endif

static inline void dfp_pause(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Waits for `changed` until `end`. */
#define DFP_WATCH(changed, end)                                                  \
    while (!(changed) && dfp_now() < (end))                                      \
        for (int i = 0; i < 32 && !(changed); i++) dfp_pause()

static inline int64_t dfp_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* A job that a worker may join. */
static dfp_job *dfp_open_job(void) {
    for (dfp_job *job = dfp_team.jobs; job; job = job->after)
        if (job->inside < job->threads - 1 && dfp_team.running < job->limit
            && DFP_READ(job->next) < job->n)
            return job;
    return NULL;
}

/* Tells workers of it. */
static void dfp_call(void) {
    const dfp_job *job = dfp_open_job();
    if (!job) return;
    DFP_WRITE(dfp_team.calls, dfp_team.calls + 1);
    int wanted = job->threads - 1 - job->inside;
    if (wanted > job->limit - dfp_team.running) wanted = job->limit - dfp_team.running;
    wanted -= dfp_team.waiting;
    if (wanted > 2) wanted = 2;
    for (int i = 1; wanted > 0 && i < dfp_team.size; i++)
        if (dfp_team.worker[i].asleep) {
            dfp_team.worker[i].asleep = 0;
            dfp_team.waiting++;
            pthread_cond_signal(&dfp_team.worker[i].called);
            wanted--;
        }
}

/* The lowest number that no worker inside has. */
static int dfp_number(dfp_job *job) {
    int word = 0;
    while (job->numbers[word] == UINT64_MAX) word++;
    const int bit = __builtin_ctzll(~job->numbers[word]);
    job->numbers[word] |= (uint64_t)1 << bit;
    return 64 * word + bit;
}

/* On every CPU, the thread that began a task there and has not ended its work. */
static const void *dfp_taken[CPU_SETSIZE];

/* Moves the calling thread to a CPU that none has, if there is one. Where other processes keep that
 * busy, it returns late, and where the system forbids it, at once: then nobody moves for a while. */
static void dfp_move(void) {
    static int64_t stay;
    cpu_set_t allowed, vacant, every, now;
    const int64_t start = dfp_now();
    if (start < DFP_READ(stay) || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    CPU_ZERO(&vacant);
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &allowed) && !DFP_READ(dfp_taken[i])) CPU_SET(i, &vacant);
    if (!CPU_COUNT(&vacant)) return;
    if (!sched_setaffinity(0, sizeof vacant, &vacant)) {
        /* Any CPU is what a thread may have that nobody has bound: CPUs of the process that come
         * later are among them. */
        memset(&every, 0xff, sizeof every);
        sched_setaffinity(0, sizeof every, &every);
        if (sched_getaffinity(0, sizeof now, &now) || !CPU_EQUAL(&now, &allowed))
            sched_setaffinity(0, sizeof allowed, &allowed);
        if (dfp_now() - start < DFP_PATIENCE) return;
    }
    DFP_WRITE(stay, dfp_now() + DFP_STAY);
}

/* The CPU that `me` has for itself from now on, or -1; `mine` is that of before. Linux lets threads
 * share a CPU for milliseconds while another one is idle. */
static int dfp_take_cpu(const void *me, int mine) {
    const void *none = NULL;
    int cpu = sched_getcpu();
    if (cpu == mine) return mine;
    if (mine >= 0) DFP_WRITE(dfp_taken[mine], NULL);
    if (cpu >= 0 && cpu < CPU_SETSIZE && DFP_READ(dfp_taken[cpu])) {
        dfp_move();
        cpu = sched_getcpu();
    }
    if (cpu < 0 || cpu >= CPU_SETSIZE) return -1;
    return __atomic_compare_exchange_n(&dfp_taken[cpu], &none, me, 0, __ATOMIC_RELAXED,
                                       __ATOMIC_RELAXED) ? cpu : -1;
}

/* Tasks of a job, for as long as there are any; a worker's, for as long as it is not in the way. */
static void dfp_work(dfp_job *job, int thread) {
    const float_env outer = dfp_float_default();
    int cpu = -1;
    while (DFP_READ(job->next) < job->n
           && (!thread || DFP_READ(dfp_team.running) <= job->limit)) {
        cpu = dfp_take_cpu(&cpu, cpu); /* it may take a while: without a task in hand */
        const int64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (i >= job->n) break;
        job->task(job->work, i, thread);
    }
    if (cpu >= 0) DFP_WRITE(dfp_taken[cpu], NULL);
    dfp_float_restore(outer);
}

/* A worker's whole life. */
static void dfp_serve(int me) {
    int64_t until = 0;
    pthread_mutex_lock(&dfp_team.lock);
    for (;;) {
        dfp_job *job = dfp_open_job();
        if (job) {
            const int number = dfp_number(job);
            DFP_WRITE(job->inside, job->inside + 1);
            DFP_WRITE(dfp_team.running, dfp_team.running + 1);
            dfp_call();
            pthread_mutex_unlock(&dfp_team.lock);
            dfp_work(job, number);
            pthread_mutex_lock(&dfp_team.lock);
            DFP_WRITE(dfp_team.running, dfp_team.running - 1);
            DFP_WRITE(job->inside, job->inside - 1);
            job->numbers[number / 64] &= ~((uint64_t)1 << number % 64);
            if (!job->inside) pthread_cond_signal(&job->left);
            until = dfp_now() + DFP_PATIENCE;
            continue;
        }
        if (dfp_team.running + dfp_team.waiting < dfp_team.size && dfp_now() < until) {
            const unsigned calls = dfp_team.calls;
            dfp_team.waiting++;
            pthread_mutex_unlock(&dfp_team.lock);
            DFP_WATCH(DFP_READ(dfp_team.calls) != calls, until);
            pthread_mutex_lock(&dfp_team.lock);
            dfp_team.waiting--;
            if (dfp_team.calls != calls) continue;
        }
        dfp_team.worker[me].asleep = 1;
        while (dfp_team.worker[me].asleep)
            pthread_cond_wait(&dfp_team.worker[me].called, &dfp_team.lock);
        dfp_team.waiting--;
    }
}

static void *dfp_open_region(void *first_and_count) {
    const intptr_t both = (intptr_t)first_and_count;
    dfp_team.region((int)(both >> 16), (int)(both & 0xffff));
    return NULL;
}

/* With the lock held. Where the system has no thread left, the team stays as it is, and later jobs
 * try again; but where OpenMP is the one to find out, it ends the process. */
static void dfp_grow(int size) {
    pthread_t thread;
    const intptr_t first = dfp_team.size, both = first << 16 | (size - first);
    for (int i = dfp_team.size; i < size; i++)
        pthread_cond_init(&dfp_team.worker[i].called, NULL);
    if (pthread_create(&thread, NULL, dfp_open_region, (void *)both)) return;
    pthread_detach(thread);
    dfp_team.size = size;
}

/* Runs task(work, i, thread) for i < n, thread < min(n, threads), while the team has no more than
 * `limit` at work. */
static void dfp_run(dfp_task task, void *work, int64_t n, int threads, int limit) {
    if (threads > n) threads = (int)n;
    dfp_job job = {.task = task, .work = work, .n = n, .threads = threads, .limit = limit,
                   .numbers = {1}, .left = PTHREAD_COND_INITIALIZER};
    if (threads <= 1 || dfp_team.forked) {
        dfp_work(&job, 0);
        return;
    }
    dfp_job **end;
    pthread_mutex_lock(&dfp_team.lock);
    if (limit > dfp_team.size) dfp_grow(limit);
    for (end = &dfp_team.jobs; *end;) end = &(*end)->after;
    *end = &job;
    DFP_WRITE(dfp_team.running, dfp_team.running + 1);
    dfp_call();
    pthread_mutex_unlock(&dfp_team.lock);
    dfp_work(&job, 0);
    pthread_mutex_lock(&dfp_team.lock);
    for (end = &dfp_team.jobs; *end != &job;) end = &(*end)->after;
    *end = job.after;
    DFP_WRITE(dfp_team.running, dfp_team.running - 1);
    dfp_call();
    if (job.inside) {
        pthread_mutex_unlock(&dfp_team.lock);
        const int64_t until = dfp_now() + DFP_PATIENCE;
        DFP_WATCH(!DFP_READ(job.inside), until);
        pthread_mutex_lock(&dfp_team.lock);
        while (job.inside) pthread_cond_wait(&job.left, &dfp_team.lock);
    }
    pthread_mutex_unlock(&dfp_team.lock);
    pthread_cond_destroy(&job.left);
}

static void dfp_in_child(void) {
    dfp_team.forked = 1;
    memset(dfp_taken, 0, sizeof dfp_taken);
}

static void dfp_open_team(dfp_region region) {
    dfp_team.region = region;
    pthread_atfork(NULL, NULL, dfp_in_child);
}

#undef DFP_READ
#undef DFP_WRITE
#undef DFP_WATCH
#endif
