# The clock that cores really run at, to tell how near a kernel comes to what they can do.

cdef extern from *:
    """
    #include <time.h>

    /* A chain of additions, each waiting for the one before: one cycle each. Of two registers,
       because some CPUs fold constants away; opaque to the compiler, which would do the same. */
    #define DFP_ADD __asm__ __volatile__("" : "+r"(x)); x += y;
    static double dfp_clock(void) {
        const long n = 4000000;
        struct timespec start, end;
        unsigned long x = 0, y = 1;
        __asm__ __volatile__("" : "+r"(y));
        clock_gettime(CLOCK_MONOTONIC, &start);
        for (long i = 0; i < n; i += 8) {
            DFP_ADD DFP_ADD DFP_ADD DFP_ADD DFP_ADD DFP_ADD DFP_ADD DFP_ADD
        }
        __asm__ __volatile__("" : "+r"(x));
        clock_gettime(CLOCK_MONOTONIC, &end);
        return n / ((end.tv_sec - start.tv_sec) + 1e-9 * (end.tv_nsec - start.tv_nsec));
    }
    #undef DFP_ADD
    """
    double dfp_clock() noexcept nogil


def clock():
    """Returns the clock of the calling core in Hz; measuring takes about a millisecond."""
    return dfp_clock()
