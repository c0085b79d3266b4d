# Local response normalisation and its gradient: every pixel by itself (numerics.md, "Local response
# normalisation").

cdef struct Response:
    dfp_response how
    int64_t pixels
    const float* x
    const float* dy             # or NULL
    float* y
    # How.
    int threads
    int64_t task                # pixels of one
    int64_t room                # floats of one thread
    float* scratch


cdef void response_plan(Response* r) noexcept nogil:
    cdef int64_t n = r.how.n
    r.threads = pass_threads(<double>r.pixels * n * (2 * r.how.radius + 1))
    r.task = max(<int64_t>1, SUM_WORK // max(<int64_t>1, n))
    r.room = round_up(4 * n + 2 * r.how.radius, ALIGN // sizeof(float))


cdef void response_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Response* r = <Response*>work
    cdef int64_t first = i * r.task, n = r.how.n
    cdef const float* dy = NULL
    if r.dy != NULL:
        dy = r.dy + first * n
    kernel.response(&r.how, r.x + first * n, dy, min(r.task, r.pixels - first),
                    r.scratch + thread * r.room, r.y + first * n)


cdef void response_run(Response* r) noexcept nogil:
    parallel_for(response_task, r, (r.pixels + r.task - 1) // r.task, r.threads)
