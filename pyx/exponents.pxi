# The exponents of a product: numerics.md, "A product".
#
# Those of an operand come as one, or as one for each group of its rows. Along K they differ where a
# sum runs through groups, as a weight gradient's through samples. Then B is aligned: a product k
# whose exponents sum to e is shifted right by E - e, E the largest such sum of the item; but if
# there is room for it, all of B has one bit more, so that those next to the largest lose nothing.

# Row i (or column i) of item b of the product has e[(b * item + i) // per]; one `e` that is NULL
# says that they do not differ.
cdef struct Axis:
    const int32_t* e
    int64_t item, per

# Product k of item b is shifted by shift[(b * item + k) // per], -1 to 16; none is if it is NULL.
cdef struct Shifts:
    int8_t* shift
    int64_t item, per
    int more                    # bits that B has after it

cdef struct Exponents:
    int64_t all                 # of all sums,
    const int64_t* items        # and of those of an item, or NULL
    Axis row, column
    Shifts shifts


cdef inline int64_t added(int64_t e1, int64_t e2) noexcept nogil:
    """Exponents are int32, and those far beyond float32 may cancel: their sums are not clamped."""
    if e1 == NAN_EXPONENT or e2 == NAN_EXPONENT:
        return NAN_EXPONENT
    # A sum is no NaN; so far below float32 one less is the same.
    return e1 + e2 - (e1 + e2 == NAN_EXPONENT)


cdef inline int64_t item_exponent(const Exponents* x, int64_t item) noexcept nogil:
    return x.all if x.items == NULL else added(x.all, x.items[item])


cdef inline int64_t group_end(int64_t item_length, int64_t per, int64_t item,
                              int64_t i) noexcept nogil:
    """Where, in an item of `item_length`, the group of `per` ends in which i lies."""
    cdef int64_t start = item * item_length
    return ((start + i) // per + 1) * per - start


cdef inline int64_t on_axis(const Axis* x, int64_t item, int64_t i) noexcept nogil:
    return 0 if x.e == NULL else x.e[(item * x.item + i) // x.per]


cdef inline int64_t row_exponent(const Exponents* x, int64_t item, int64_t row) noexcept nogil:
    """What is not a column's."""
    return added(item_exponent(x, item), on_axis(&x.row, item, row))


cdef inline int64_t column_exponent(const Exponents* x, int64_t item,
                                    int64_t column) noexcept nogil:
    return on_axis(&x.column, item, column)


cdef inline int shift_of(const Shifts* s, int64_t item, int64_t k) noexcept nogil:
    return s.shift[(item * s.item + k) // s.per]


cdef bint any_doubled(const Shifts* s, int64_t item, int64_t k, int64_t count) noexcept nogil:
    """Do any of `count` products from k on have the bit more?"""
    cdef int64_t group, end
    if s.shift == NULL:
        return False
    group, end = (item * s.item + k) // s.per, (item * s.item + k + count - 1) // s.per
    while group <= end:
        if s.shift[group] < 0:
            return True
        group += 1
    return False


cdef void shifts_of(const Shifts* s, int64_t item, int64_t k, int64_t count,
                    int* out) noexcept nogil:
    """Those of `count` products from k on, 0 up to 64."""
    cdef int64_t i = 0, end
    cdef int shift
    while i < count:
        shift = shift_of(s, item, k + i)
        end = min(count, group_end(s.item, s.per, item, k + i) - k)
        while i < end:
            out[i] = shift
            i += 1
    while i < 64:
        out[i] = 0
        i += 1


cdef extern from *:
    """
    /* 2**e of a normal exponent. */
    static inline float dfp_power(int e) {
        const union { uint32_t bits; float value; } power = {(uint32_t)(e + 127) << 23};
        return power.value;
    }
    """
    float dfp_power(int e) noexcept nogil


cdef inline float fast_scale(int64_t e, int64_t least, int64_t most) noexcept nogil:
    """2**e, NaN, or 0 where e is not within bounds."""
    if least <= e <= most:
        return dfp_power(<int>e)
    return NAN if e == NAN_EXPONENT else 0


cdef bint find_scales(const Exponents* x, int64_t item, int64_t m0, int64_t mc, int64_t rows,
                      float* row_scale, int64_t n0, int64_t nc,
                      float* column_scale) noexcept nogil:
    """The scales of a block's rows, m0 .. m0 + mc and up to `rows` whatever, and of its columns.

    Neither a scale nor a nonzero result (a sum of at least 1, below 2**47) times one of them or
    both may be subnormal or overflow where it should not: where that is not certain, a scale is 0.
    Returns whether there are any such.
    """
    cdef int64_t i = 0, end, least = -126, most = 127, base = item_exponent(x, item)
    cdef float scale = 1
    cdef bint careful = False
    if column_scale != NULL:
        least, most = -62, 62
        while i < nc:
            end = min(nc, group_end(x.column.item, x.column.per, item, n0 + i) - n0)
            scale = fast_scale(column_exponent(x, item, n0 + i), least, most)
            careful |= scale == 0
            while i < end:
                column_scale[i] = scale
                i += 1
    i = 0
    while i < rows:
        end = rows
        if x.row.e != NULL and i < mc:
            end = min(mc, group_end(x.row.item, x.row.per, item, m0 + i) - m0)
        if i < mc:
            scale = fast_scale(added(base, on_axis(&x.row, item, m0 + i)), least, most)
            careful |= scale == 0
        while i < end:
            row_scale[i] = scale
            i += 1
    return careful


# The exponents of an operand of a product: e[r // per] of row r, as it is stored, of all its items.
cdef struct Operand:
    const int32_t* e
    int64_t count, per


cdef inline bint spread_over(const Operand* o, int64_t item_rows) noexcept nogil:
    """Do the rows of an item have more than one?"""
    return o.count > 1 and o.per < item_rows


cdef int64_t exponent_bytes(int64_t batch, int64_t k) noexcept nogil:
    """Room that resolve_exponents may need."""
    return round_up(batch * sizeof(int64_t), ALIGN) + batch * k


cdef void resolve_exponents(Exponents* x, int64_t batch, const Operand* a, int64_t m,
                            bint a_along_k, const Operand* b, int64_t n, bint b_along_k,
                            int64_t k, int64_t b_bits, char* room) noexcept nogil:
    """Says where the exponents of a product's operands act: on items, rows, columns, or along K.

    Rows of `a` as it is stored are rows of the product or, if `a_along_k`, products; those of `b`,
    whose mantissas have `b_bits`, columns or products. `room` is of exponent_bytes, and is used
    only where it is needed.
    """
    cdef bint a_spread = spread_over(a, k if a_along_k else m)
    cdef bint b_spread = spread_over(b, k if b_along_k else n)
    cdef bint a_k = a_spread and a_along_k, b_k = b_spread and b_along_k
    cdef int64_t* items = <int64_t*>room
    cdef int8_t* shift
    cdef int64_t item, i, e, most, per, any = 0
    cdef int more = 1 if b_bits < 16 else 0
    memset(x, 0, sizeof(Exponents))
    if a.count == 1:
        x.all = added(x.all, a.e[0])
    elif a_spread and not a_along_k:
        x.row.e, x.row.item, x.row.per = a.e, m, a.per
    if b.count == 1:
        x.all = added(x.all, b.e[0])
    elif b_spread and not b_along_k:
        x.column.e, x.column.item, x.column.per = b.e, n, b.per
    if batch == 0 or not (a_k or b_k or (a.count > 1 and not a_spread)
                          or (b.count > 1 and not b_spread)):
        return
    per = k
    if a_k or b_k:
        per = gcd(a.per if a_k else 0, b.per if b_k else 0)
    x.items = items
    shift = <int8_t*>room + round_up(batch * sizeof(int64_t), ALIGN)
    for item in range(batch):
        e = 0
        if a.count > 1 and not a_spread:
            e = added(e, a.e[item * (k if a_along_k else m) // a.per])
        if b.count > 1 and not b_spread:
            e = added(e, b.e[item * (k if b_along_k else n) // b.per])
        items[item] = e
        if not (a_k or b_k):
            continue
        most = -(<int64_t>1 << 40)
        for i in range(k // per):
            e = along_k(a, b, a_k, b_k, item * k + i * per)
            if e == NAN_EXPONENT:
                most = e
                break
            most = max(most, e)
        items[item] = added(items[item], most)
        for i in range(k // per):
            e = 0
            if most != NAN_EXPONENT:
                e = most - along_k(a, b, a_k, b_k, item * k + i * per)
            any |= e
            shift[item * (k // per) + i] = <int8_t>min(<int64_t>16, e - more)
    if any:
        x.shifts.shift, x.shifts.item, x.shifts.per, x.shifts.more = shift, k, per, more
        x.all = added(x.all, -more)


cdef inline int64_t along_k(const Operand* a, const Operand* b, bint a_k, bint b_k,
                            int64_t k) noexcept nogil:
    """The exponents of product k, counted through all items."""
    return added(a.e[k // a.per] if a_k else 0, b.e[k // b.per] if b_k else 0)
