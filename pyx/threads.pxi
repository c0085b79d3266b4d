# The only door to OpenMP: every parallel region of the library is opened here.
#
# libgomp keeps one team per thread that opens regions, and TensorFlow runs ops on several. So a
# region takes the team only if no other kernel holds one (a try-lock, never a wait), and begins
# serially otherwise, until the team is free. A forked child has no team: its first region would
# hang, so it stays serial.

cdef extern from *:
    """
    #include <pthread.h>
    #include <omp.h>

    static pthread_mutex_t dfp_team = PTHREAD_MUTEX_INITIALIZER;
    static volatile int dfp_forked, dfp_thread_limit;
    /* Products below which a parallel region costs more than it saves: to wake threads that sleep
       takes 50 us. */
    enum { DFP_SMALL = 8000000 };
    static volatile int64_t dfp_small = DFP_SMALL;
    static void dfp_in_child(void) { dfp_forked = 1; }
    static void dfp_watch_forks(void) { pthread_atfork(NULL, NULL, dfp_in_child); }
    static int dfp_take_team(void) { return pthread_mutex_trylock(&dfp_team) == 0; }
    static void dfp_leave_team(void) { pthread_mutex_unlock(&dfp_team); }

    /* TensorFlow's threads flush subnormals, OpenMP's workers do not: every task runs with the
       default floating-point environment, so that results do not depend on the thread. */
    typedef unsigned long float_env;
    #if defined(__x86_64__)
    #include <immintrin.h>
    static inline float_env dfp_float_default(void) {
        float_env old = _mm_getcsr();
        _mm_setcsr(0x1f80);
        return old;
    }
    static inline void dfp_float_restore(float_env old) {
        _mm_sfence();           /* streamed results are visible before the region ends */
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
    """
    ctypedef unsigned long float_env
    int dfp_forked, dfp_thread_limit
    int64_t DFP_SMALL
    int64_t SMALL "dfp_small"
    void dfp_watch_forks() noexcept nogil
    bint dfp_take_team() noexcept nogil
    void dfp_leave_team() noexcept nogil
    float_env dfp_float_default() noexcept nogil
    void dfp_float_restore(float_env) noexcept nogil
    int omp_get_max_threads() noexcept nogil
    int omp_get_thread_num() noexcept nogil


# One piece of work: `index` of the region's n, on thread `thread` (for its own scratch).
ctypedef void (*task_fn)(void* work, int64_t index, int thread) noexcept nogil


cdef inline int team_size() noexcept nogil:
    """How many threads a region may use; plans size their scratch by it."""
    if dfp_forked:
        return 1
    return dfp_thread_limit if dfp_thread_limit > 0 else omp_get_max_threads()


cdef inline int pass_threads(double count) noexcept nogil:
    """For a pass that moves so many elements: each takes as long as 64 products."""
    return team_size() if 64 * count > SMALL else 1


cdef void parallel_for(task_fn task, void* work, int64_t n, int threads) noexcept nogil:
    """Runs task(work, i, thread) for i in range(n) on at most `threads` threads."""
    cdef int64_t i, done = 0
    cdef float_env env = 0
    cdef float_env outer = dfp_float_default()
    if dfp_forked:
        threads = 1
    while done < n:
        threads = <int>min(<int64_t>threads, n - done)
        if threads > 1 and dfp_take_team():
            with parallel(num_threads=threads):
                env = dfp_float_default()
                for i in prange(done, n, schedule="dynamic", chunksize=1):
                    task(work, i, omp_get_thread_num())
                dfp_float_restore(env)
            dfp_leave_team()
            break
        task(work, done, 0)
        done += 1
    dfp_float_restore(outer)


def set_threads(int n, int64_t small=DFP_SMALL):
    """Limits every kernel to n threads; 0 means OpenMP's own setting.

    Work of no more than `small` products runs on one thread all the same: tests set it to 0, so
    that small shapes reach what large ones run.
    """
    global dfp_thread_limit, SMALL
    if n < 0 or small < 0:
        raise ValueError(
            f"set_threads: n must be 0 (OpenMP's setting) or positive, small not negative; got "
            f"{n} and {small}."
        )
    dfp_thread_limit = n
    SMALL = small


def threads():
    """Returns how many threads a kernel may use."""
    return team_size()
