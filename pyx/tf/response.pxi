# DfpLocalResponse and its gradient.

cdef void register_response(TF_Status* st) noexcept nogil:
    register_op("DfpLocalResponse", RESPONSE_SIGNATURE, same_shape, response_create,
                response_compute, st)
    register_op("DfpLocalResponseGradient", RESPONSE_GRADIENT_SIGNATURE, same_shape,
                response_create, response_gradient_compute, st)


cdef extern from *:
    """
    #define DFP_RESPONSE_ATTRS  \\
        "radius: int >= 0; bias: float; alpha: float; quarters: int >= 1"
    #define DFP_RESPONSE_SIGNATURE "x: float -> y: float | " DFP_RESPONSE_ATTRS
    #define DFP_RESPONSE_GRADIENT_SIGNATURE  \\
        "x: float; dy: float -> dx: float | " DFP_RESPONSE_ATTRS
    """
    const char* RESPONSE_SIGNATURE "DFP_RESPONSE_SIGNATURE"
    const char* RESPONSE_GRADIENT_SIGNATURE "DFP_RESPONSE_GRADIENT_SIGNATURE"


cdef void* response_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef dfp_response* a = <dfp_response*>calloc(1, sizeof(dfp_response))
    cdef TF_Status* st = tf.NewStatus()
    cdef int64_t quarters = int_attr(k, "quarters", st)
    cdef char text[100]
    a.radius = int_attr(k, "radius", st)
    a.bias, a.alpha = float_attr(k, "bias", st), float_attr(k, "alpha", st)
    if tf.GetCode(st) == TF_OK and quarters > 4:
        snprintf(text, sizeof(text), "quarters must be from 1 to 4; got %lld", <long long>quarters)
        tf.SetStatus(st, TF_INVALID_ARGUMENT, text)
    a.quarters = <int>quarters
    # 2 * alpha * beta, rounded once.
    a.slope = <float>(<double>a.alpha * quarters / 2)
    finish_create(k, st)
    return a


cdef void response_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    compute_response("DfpLocalResponse", <const dfp_response*>attrs, False, context)


cdef void response_gradient_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    compute_response("DfpLocalResponseGradient", <const dfp_response*>attrs, True, context)


cdef void compute_response(const char* name, const dfp_response* how, bint gradient,
                           TF_OpKernelContext* context) noexcept nogil:
    cdef Call c
    cdef Shape x, dy
    cdef Response r
    memset(&r, 0, sizeof(r))
    open_call(&c, name, context)
    r.x = <const float*>get_input(&c, 0, "x", &x)
    check_rank(&c, "x", &x)
    if gradient:
        r.dy = <const float*>get_input(&c, 1, "dy", &dy)
        if ok(&c) and not same_dims(&dy, &x):
            fail_shapes(&c, "the gradient must have the shape of x", "dy", &dy, "x", &x)
    if ok(&c):
        r.y = <float*>set_output(&c, 0, TF_FLOAT, x.dim, x.rank)
        r.how = how[0]
        r.how.n = x.dim[x.rank - 1]
        r.pixels = elements(x.dim, x.rank - 1)
        # Farther away, there are no channels.
        r.how.radius = max(<int64_t>0, min(how.radius, r.how.n - 1))
        response_plan(&r)
        r.scratch = <float*>get_scratch(&c, r.threads * r.room * sizeof(float))
        if ok(&c) and r.how.n:
            response_run(&r)
    close_call(&c)
