# Telling Python of an operand that lost much of itself, from whatever thread quantized it: losses
# wait in a list until Python's main thread comes by and hands them to `loss_handler`.

cdef extern from "Python.h":
    int Py_AddPendingCall(int (*func)(void*) noexcept, void* arg) noexcept nogil

cdef struct Loss:
    char site[200]
    double share
    int64_t nonzero

cdef extern from *:
    """
    static pthread_mutex_t dfp_losses = PTHREAD_MUTEX_INITIALIZER;
    static void dfp_lock_losses(void) { pthread_mutex_lock(&dfp_losses); }
    static void dfp_unlock_losses(void) { pthread_mutex_unlock(&dfp_losses); }
    /* A child has none of the threads that may have held it. */
    static void dfp_renew_losses(void) { pthread_mutex_init(&dfp_losses, NULL); }
    static void dfp_watch_losses(void) { pthread_atfork(NULL, NULL, dfp_renew_losses); }
    """
    void dfp_lock_losses() noexcept nogil
    void dfp_unlock_losses() noexcept nogil
    void dfp_watch_losses() noexcept nogil

cdef enum:
    LOSSES = 16

cdef Loss losses[LOSSES]
cdef int loss_count
cdef bint telling               # is there somebody to tell?
loss_handler = None


cdef inline bint much_is_lost(uint64_t worst) noexcept nogil:
    """Half of what was not zero."""
    return worst >> 40 >= 1 << 19


cdef bint tell_loss(const char* site, uint64_t worst) noexcept nogil:
    """Returns whether it will be told; there may be no room, or nobody, for the time being."""
    cdef bint room
    dfp_lock_losses()
    global loss_count
    room = telling and loss_count < LOSSES and Py_AddPendingCall(hand_over, NULL) == 0
    if room:
        memcpy(losses[loss_count].site, site, sizeof(losses[loss_count].site))
        losses[loss_count].share = <double>(worst >> 40) / (1 << 20)
        losses[loss_count].nonzero = <int64_t>(worst & ((<uint64_t>1 << 40) - 1))
        loss_count += 1
    dfp_unlock_losses()
    return room


cdef int hand_over(void* unused) noexcept with gil:
    """On the main thread. A warning that is turned into an error is raised there."""
    global loss_count
    cdef Loss loss
    dfp_lock_losses()
    if loss_count:
        loss_count -= 1
        loss = losses[loss_count]
    else:
        loss.site[0] = 0
    dfp_unlock_losses()
    if not loss.site[0] or loss_handler is None:
        return 0
    try:
        loss_handler(loss.site.decode(errors="replace"), loss.share, loss.nonzero)
    except BaseException as error:
        return raise_again(error)
    return 0


cdef extern from "Python.h":
    void PyErr_SetObject(object, object)


cdef int raise_again(error) noexcept:
    PyErr_SetObject(type(error), error)
    return -1


def set_loss_handler(handler):
    """Makes `handler(site, share, nonzero)` the function that is told, once for each kernel, of a
    quantization with a `site` that loses half of a group's nonzero elements or more; with None,
    nobody is."""
    global loss_handler, telling
    cdef bint some = handler is not None
    loss_handler = handler
    # When this returns, nobody is on the way to a Python that may be about to end.
    with nogil:
        dfp_lock_losses()
        telling = some
        dfp_unlock_losses()
