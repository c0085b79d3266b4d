# DfpSgd, DfpAdam: new weights and slots. Python reads the variables and assigns to them; no C API
# that TensorFlow's library exports reaches a variable. Weights are written where the gradient is,
# if nobody else wants it; TensorFlow makes new memory for slots.

cdef void register_optimizer(TF_Status* st) noexcept nogil:
    register_op("DfpSgd", SGD_SIGNATURE, same_shape, sgd_create, update_compute, st)
    register_op("DfpAdam", ADAM_SIGNATURE, same_shape, adam_create, update_compute, st)


cdef extern from *:
    """
    #define DFP_UPDATE_TENSORS  \\
        "weight: float; gradient: float; rate: float; step: int64; slots: n_slots * T; "  \\
        "exponents: n_exponents * int32 -> "  \\
        "new_weight: float; new_slots: n_slots * T; new_exponents: n_exponents * int32 | "
    #define DFP_UPDATE_ATTRS  \\
        "weight_decay: float = 0.0; seed: int = 0; T: {float, int16} = DT_FLOAT; "  \\
        "n_slots: int >= 0; n_exponents: int >= 0"
    #define DFP_SGD_SIGNATURE  \\
        DFP_UPDATE_TENSORS "momentum: float = 0.0; nesterov: bool = false; " DFP_UPDATE_ATTRS
    #define DFP_ADAM_SIGNATURE  \\
        DFP_UPDATE_TENSORS "beta_1: float; beta_2: float; renewal_1: float; renewal_2: float; "  \\
        "epsilon: float; " DFP_UPDATE_ATTRS
    """
    const char* SGD_SIGNATURE "DFP_SGD_SIGNATURE"
    const char* ADAM_SIGNATURE "DFP_ADAM_SIGNATURE"

cdef struct UpdateAttrs:
    bint adam
    dfp_update step
    float beta, beta2
    int slots, exponents
    uint32_t seed


cdef void update_attrs(TF_OpKernelConstruction* k, UpdateAttrs* a, int least, int most,
                       TF_Status* st) noexcept nogil:
    cdef int64_t slots = int_attr(k, "n_slots", st), exponents = int_attr(k, "n_exponents", st)
    cdef char text[200]
    a.step.decay = float_attr(k, "weight_decay", st)
    a.seed = <uint32_t>int_attr(k, "seed", st)
    if tf.GetCode(st) == TF_OK and not (least <= slots <= most and exponents in (0, slots)):
        snprintf(text, sizeof(text), "there must be %d to %d slots, and exponents for all or none; "
                 "got %lld and %lld", least, most, <long long>slots, <long long>exponents)
        tf.SetStatus(st, TF_INVALID_ARGUMENT, text)
    a.slots, a.exponents = <int>slots, <int>exponents


cdef void* sgd_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef UpdateAttrs* a = <UpdateAttrs*>calloc(1, sizeof(UpdateAttrs))
    cdef TF_Status* st = tf.NewStatus()
    update_attrs(k, a, 0, 1, st)
    a.step.momentum = float_attr(k, "momentum", st)
    a.step.nesterov = bool_attr(k, "nesterov", st)
    finish_create(k, st)
    return a


cdef void* adam_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef UpdateAttrs* a = <UpdateAttrs*>calloc(1, sizeof(UpdateAttrs))
    cdef TF_Status* st = tf.NewStatus()
    update_attrs(k, a, 2, 3, st)
    a.adam = True
    a.beta, a.beta2 = float_attr(k, "beta_1", st), float_attr(k, "beta_2", st)
    a.step.renewal = float_attr(k, "renewal_1", st)
    a.step.renewal2 = float_attr(k, "renewal_2", st)
    a.step.epsilon = float_attr(k, "epsilon", st)
    finish_create(k, st)
    return a


cdef void* alike(Call* c, int i, const char* name, int dtype, const Shape* weight) noexcept nogil:
    """An input that must have the shape of the weight."""
    cdef Shape shape
    cdef void* data = get_input(c, i, name, &shape)
    if ok(c) and tf.TensorType(c.held[c.held_count - 1]) != dtype:
        fail(c, "slots must be int16 where there are exponents, and else float")
    if ok(c) and not same_dims(&shape, weight):
        fail_shapes(c, "gradient and slots must have the shape of the weight", name, &shape,
                    "weight", weight)
    return data


cdef float* weight_output(Call* c, const Shape* shape) noexcept nogil:
    """The first output: the gradient's memory if it can be had, which is so only until somebody,
    we ourselves too, holds the gradient."""
    cdef int gradient = 1, forwarded
    cdef TF_Tensor* t = NULL
    if ok(c):
        t = hold(c, tf.ForwardInputOrAllocateOutput(
            c.context, &gradient, 1, 0, shape.dim, shape.rank, &forwarded, c.status))
    return <float*>tf.TensorData(t) if t != NULL else NULL


cdef void update_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef UpdateAttrs* a = <UpdateAttrs*>attrs
    cdef Call c
    cdef Update u
    cdef Shape shape
    cdef int64_t blocks, step = 0
    cdef double p, p2
    cdef const float* rate
    cdef const int64_t* counted
    cdef int s
    memset(&u, 0, sizeof(u))
    open_call(&c, "DfpAdam" if a.adam else "DfpSgd", context)
    u.step, u.adam, u.slots, u.seed = a.step, a.adam, a.slots, a.seed
    u.w = <const float*>get_input(&c, 0, "weight", &shape)
    u.w_to = weight_output(&c, &shape)
    if not ok(&c):
        close_call(&c)
        return
    u.n = elements(shape.dim, shape.rank)
    u.g = <const float*>alike(&c, 1, "gradient", TF_FLOAT, &shape)
    rate = <const float*>sized_input(&c, 2, "rate", 1)
    counted = <const int64_t*>sized_input(&c, 3, "step", 1)
    blocks = slot_blocks(u.n)
    for s in range(a.slots):
        if a.exponents:
            u.q[s] = <const int16_t*>alike(&c, 4 + s, "slots", TF_INT16, &shape)
            u.e[s] = <const int32_t*>sized_input(&c, 4 + a.slots + s, "exponents", blocks)
            u.new_q[s] = <int16_t*>set_output(&c, 1 + s, TF_INT16, shape.dim, shape.rank)
            u.new_e[s] = <int32_t*>set_output(&c, 1 + a.slots + s, TF_INT32, &blocks, 1)
        else:
            u.slot[s] = <const float*>alike(&c, 4 + s, "slots", TF_FLOAT, &shape)
            u.new_slot[s] = <float*>set_output(&c, 1 + s, TF_FLOAT, shape.dim, shape.rank)
    if ok(&c):
        u.step.rate, step = rate[0], counted[0]
        u.count = <uint64_t>step
        if a.adam:
            p, p2 = power_of(a.beta, step), power_of(a.beta2, step)
            u.step.alpha = <float>(rate[0] * sqrt(1.0 - p2) / (1.0 - p))
        update(&u)
    close_call(&c)
