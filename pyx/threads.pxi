# The only door to OpenMP. Its threads are the team's workers (team.h): they stay in one parallel
# region, and every op's tasks are a job for them. A forked child has no workers and stays serial.

cdef extern from "team.h":
    """
    static volatile int dfp_thread_limit;
    /* Products below which a job is not worth telling others of. */
    enum { DFP_SMALL = 8000000 };
    static volatile int64_t dfp_small = DFP_SMALL;
    """
    ctypedef void (*task_fn "dfp_task")(void* work, int64_t index, int thread) noexcept nogil
    ctypedef unsigned long float_env
    int64_t dfp_now() noexcept nogil
    bint FORKED "dfp_team.forked"
    int dfp_thread_limit
    int DFP_MOST_THREADS
    int64_t DFP_SMALL
    int64_t SMALL "dfp_small"
    float_env dfp_float_default() noexcept nogil
    void dfp_float_restore(float_env) noexcept nogil
    void dfp_open_team(void (*region)(int, int) noexcept nogil) noexcept nogil
    void dfp_serve(int worker) noexcept nogil
    void dfp_run(task_fn task, void* work, int64_t n, int threads, int limit) noexcept nogil

cdef extern from "<omp.h>":
    void omp_set_dynamic(int) noexcept nogil
    int omp_get_max_threads() noexcept nogil
    int omp_get_thread_limit() noexcept nogil
    int omp_get_thread_num() noexcept nogil


cdef void open_region(int first, int count) noexcept nogil:
    """The region of workers first .. first + count - 1: none of them leaves it."""
    omp_set_dynamic(0)          # all of them, however busy the machine is now
    with parallel(num_threads=count):
        dfp_serve(first + omp_get_thread_num())


cdef inline int team_size() noexcept nogil:
    """How many threads a job may use; plans size their scratch by it."""
    if FORKED:
        return 1
    return min(dfp_thread_limit if dfp_thread_limit > 0 else omp_get_max_threads(),
               omp_get_thread_limit(), DFP_MOST_THREADS)


cdef inline int pass_threads(double count) noexcept nogil:
    """For a pass that moves so many elements: each takes as long as 64 products."""
    return team_size() if 64 * count > SMALL else 1


cdef void parallel_for(task_fn task, void* work, int64_t n, int threads) noexcept nogil:
    """Runs task(work, i, thread) for i in range(n) on at most `threads` threads; `thread` is below
    that, for what each has to itself."""
    dfp_run(task, work, n, threads, team_size())


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
