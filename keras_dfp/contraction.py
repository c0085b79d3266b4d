"""Tensor contractions: every matmul, tensordot and two-operand einsum as one native matmul.

The axes of both tensors carry labels, as in an einsum. A label that is

    in both tensors and in the output    is a batch axis,
    in both tensors but not the output   is summed over,
    in one tensor and the output         is free.

Transposed to [batch, free, summed] and [batch, summed, free] and flattened, the tensors meet in one
(batched) matmul. Only int16 mantissas are moved for that, and nothing where the axes already lie
right. An axis to be broadcast costs nothing where its size 1 is known while tracing: without that
axis, the other tensor's is free. Otherwise, and where a label is summed in one tensor alone, the
tensor that lacks the elements repeats them, which keeps the sum one exact dot product.

A tensor has an exponent for every index of its leading axes that are not summed over: of a batch of
sequences [batch, time, features] that is multiplied by a kernel, every step of every sample has its
own. They follow the rows of the matrix that the tensor becomes.
"""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Callable, Collection, Hashable, Sequence

import tensorflow as tf

from keras_dfp.native import Matmul
from keras_dfp.number import DFPFormat
from keras_dfp.operand import Size, is_weight, reshape
from keras_dfp.product import (
    View,
    attributes,
    check_size,
    has_groups,
    multiply,
    sizes,
    total,
)

Label = Hashable


class _Side:
    """One of the two tensors, its axes labelled."""

    def __init__(self, name: str, tensor_id: int, x, labels: Sequence[Label]):
        self.name, self.tensor_id, self.x = name, tensor_id, x
        self.axes = list(labels)
        # The labels that take part: without `dropped` axes of size 1, and with `added` ones. Along
        # those, and along `stretched` axes if their size turns out to be 1, elements are repeated.
        self.labels = list(labels)
        self.dropped: list[Label] = []
        self.added: list[Label] = []
        self.stretched: list[Label] = []
        self.grouped: list[Label] = []

    def known(self, label: Label) -> int | None:
        return self.x.shape[self.axes.index(label)]

    def drop(self, label: Label):
        self.labels.remove(label)
        self.dropped.append(label)

    def add(self, label: Label):
        self.labels.append(label)
        self.added.append(label)

    def group(self, out: Collection[Label]):
        """Gives the leading axes that are in the output exponents of their own."""
        self.grouped = list(itertools.takewhile(lambda label: label in out, self.axes))

    def arrangement(self, rows: Sequence[Label], size) -> Callable | None:
        """Returns the function that brings the exponents in the order of rows with these labels.

        They may be fewer than the rows, if all rows that follow each other share them.
        """
        kept = [label for label in self.grouped if label not in self.dropped]
        stretched = [label for label in kept if label in self.stretched]
        if kept == list(rows[: len(kept)]) and not stretched:
            return None
        whole = rows[: max(rows.index(label) for label in kept) + 1]

        def arrange(exponent):
            order = [self.grouped.index(label) for label in self.dropped if label in self.grouped]
            order += [self.grouped.index(label) for label in whole if label in kept]
            exponent = tf.transpose(exponent, order)
            own = iter(sizes(exponent)[len(order) - len(kept) :])
            exponent = reshape(exponent, [next(own) if label in kept else 1 for label in whole])
            return tf.broadcast_to(exponent, [size(label) for label in whole])

        return arrange

    def view(self, groups: Sequence[Sequence[Label]], rows: Sequence[Label], size) -> View:
        """Lays the tensor out as one axis per group of labels.

        Args:
            groups: The groups.
            rows: The labels of all axes that are not summed over, in their order.
            size: Returns the size of a label.
        """
        axes = self.axes + self.added
        order = self.dropped + [label for group in groups for label in group]
        shape = None
        if self.dropped or any(len(group) != 1 for group in groups):
            shape = [total([size(label) for label in group]) for group in groups]
        expand = None
        if self.added or self.stretched:
            repeated = self.added + self.stretched

            def expand(x):
                own = sizes(x) + [1] * len(self.added)
                full = [
                    size(label) if label in repeated else n
                    for label, n in zip(axes, own, strict=True)
                ]
                return tf.broadcast_to(reshape(x, own) if self.added else x, full)

        return View(
            self.x,
            self.tensor_id,
            [axes.index(label) for label in order],
            shape,
            expand,
            len(self.grouped),
            self.arrangement(rows, size),
        )


def contract(
    op: str,
    fmt: DFPFormat,
    names: tuple[str, str],
    a,
    a_labels: Sequence[Label],
    b,
    b_labels: Sequence[Label],
    out: Sequence[Label],
    broadcast: Collection[Label] = (),
) -> tf.Tensor:
    """Returns the contraction of two tensors.

    Args:
        op: Name of the public op, for errors.
        fmt: The format.
        names: Names of the two tensors, for errors.
        a: The first tensor. Its order of the summed labels is the order of the sum.
        a_labels: A label per axis of `a`, all different.
        b: The second tensor.
        b_labels: A label per axis of `b`, all different.
        out: The labels of the result's axes.
        broadcast: Labels of `out` along which a size of 1 fits any size.

    Returns:
        A float32 tensor.

    Raises:
        ValueError: If the sizes of an axis differ.
    """
    a, b = _Side(names[0], 0, a, a_labels), _Side(names[1], 1, b, b_labels)
    for label in [label for label in a_labels if label in b_labels]:
        _match(op, a, b, label, label in broadcast)
    for one, other in ((a, b), (b, a)):
        for label in one.axes:
            if label not in out and label not in other.labels:
                other.add(label)

    for side in (a, b):
        if has_groups(fmt, side.x):
            side.group(out)

    @functools.cache
    def size(label: Label) -> Size:
        return _size(a, b, label)

    batch = [label for label in out if label in a.labels and label in b.labels]
    free_a = [label for label in out if label in a.labels and label not in batch]
    free_b = [label for label in out if label in b.labels and label not in batch]
    summed = [label for label in a.labels if label not in out]

    # The result's rows are those of the tensor that its first free axis belongs to: it is them that
    # its gradient has exponents for.
    first = next((label for label in out if label not in batch), None)
    swapped = first in free_b and bool(free_a or set(b.grouped) & set(free_b))
    if swapped:
        a, b, free_a, free_b = b, a, free_b, free_a
    result = [*batch, *free_a, *free_b]
    transpose_a = a.labels == [*batch, *summed, *free_a] != [*batch, *free_a, *summed]
    transpose_b = b.labels == [*batch, *free_b, *summed] != [*batch, *summed, *free_b]
    # Exponents belong to rows, and columns are rows of the transpose.
    transpose_b = transpose_b or any(label in free_b for label in b.grouped)

    def groups(*pair):
        return [batch, *pair] if batch else list(pair)

    if all(isinstance(n, int) for n in a.x.shape.as_list() + b.x.shape.as_list()):
        shapes = f"{a.name} of shape {tuple(a.x.shape)} and {b.name} of shape {tuple(b.x.shape)}"
        check_size(op, [size(label) for label in result], shapes)
    # What is multiplied in place of a weight is the second of two activations, as they were given.
    weights = [is_weight(side.x) for side in (a, b)]
    attrs = attributes(
        fmt,
        "a_bits",
        "b_bits",
        "dy_bits",
        swapped=swapped,
        weight_first=weights[0] if weights[0] != weights[1] else swapped,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
    )
    y = multiply(
        op,
        fmt,
        Matmul(attrs),
        a.view(
            groups(summed, free_a) if transpose_a else groups(free_a, summed), batch + free_a, size
        ),
        b.view(
            groups(free_b, summed) if transpose_b else groups(summed, free_b), batch + free_b, size
        ),
    )
    if any(len(group) != 1 for group in groups(free_a, free_b)):
        y = reshape(y, [size(label) for label in result])
    if result != list(out):
        y = tf.transpose(y, [result.index(label) for label in out])
    return y


def _match(op: str, a: _Side, b: _Side, label: Label, broadcast: bool):
    """Makes an axis of both tensors fit, or raises."""
    n, m = a.known(label), b.known(label)
    if n == m and (n is not None or not broadcast):
        return
    if broadcast and n == 1:
        a.drop(label)
    elif broadcast and m == 1:
        b.drop(label)
    elif n is not None and m is not None:
        raise ValueError(
            f"keras_dfp.ops.{op}: {a.name} of shape {tuple(a.x.shape)} and {b.name} of shape "
            f"{tuple(b.x.shape)} do not fit: axis {a.axes.index(label)} of {a.name} has {n} "
            f"elements, axis {b.axes.index(label)} of {b.name} has {m}."
        )
    elif broadcast:
        a.stretched.append(label)
        b.stretched.append(label)


def _size(a: _Side, b: _Side, label: Label) -> Size:
    found = [side for side in (a, b) if label in side.axes and label not in side.dropped]
    for side in found:
        # A known 1 was dropped unless both are 1, so any known size is the size.
        if side.known(label) is not None:
            return side.known(label)
    dynamic = [sizes(side.x)[side.axes.index(label)] for side in found]
    if label in a.stretched:
        return tf.where(dynamic[0] == 1, dynamic[1], dynamic[0])
    return dynamic[0]


def matmul(op: str, fmt: DFPFormat, a, b) -> tf.Tensor:
    """Returns NumPy's `matmul` of two tensors."""
    for name, x in (("x1", a), ("x2", b)):
        if x.shape.rank == 0:
            raise ValueError(f"keras_dfp.ops.{op}: `{name}` must have at least one axis; got ().")
    # Axes are labelled from the right, so that batch axes meet as NumPy aligns them.
    a_batch = list(range(-a.shape.rank, -2))
    b_batch = list(range(-b.shape.rank, -2))
    rows = ["row"] if a.shape.rank > 1 else []
    columns = ["column"] if b.shape.rank > 1 else []
    batch = max(a_batch, b_batch, key=len)
    return contract(
        op,
        fmt,
        ("x1", "x2"),
        a,
        [*a_batch, *rows, "sum"],
        b,
        [*b_batch, "sum", *columns],
        [*batch, *rows, *columns],
        broadcast=batch,
    )


def tensordot(op: str, fmt: DFPFormat, a, b, a_axes: Sequence[int], b_axes: Sequence[int]):
    """Returns the contraction of `a_axes` with `b_axes`, the free axes of `a` before those of b."""
    a_labels = [("a", i) for i in range(a.shape.rank)]
    b_labels = [("b", i) for i in range(b.shape.rank)]
    for i, j in zip(a_axes, b_axes, strict=True):
        b_labels[j] = a_labels[i]
    out = [label for label in a_labels + b_labels if (label in a_labels) != (label in b_labels)]
    return contract(op, fmt, ("x1", "x2"), a, a_labels, b, b_labels, out)


def einsum(op: str, fmt: DFPFormat, subscripts: str, tensors: Sequence) -> tf.Tensor:
    """Returns the einsum of one or more tensors: products from left to right."""
    labels, out = _parse(op, subscripts, [x.shape.rank for x in tensors])
    tensors = list(tensors)
    for i, (x, axes) in enumerate(zip(tensors, labels, strict=True)):
        if len(set(axes)) < len(axes):
            tensors[i], labels[i] = _diagonal(x, axes)
    x, axes, name = tensors[0], labels[0], "operands[0]"
    if len(tensors) == 1:
        letters = dict(zip(axes, string.ascii_letters, strict=False))
        return tf.einsum(
            f"{''.join(letters[n] for n in axes)}->{''.join(letters[n] for n in out)}", x
        )
    for i in range(1, len(tensors)):
        later = {*out, *(label for other in labels[i + 1 :] for label in other)}
        union = [*axes, *(label for label in labels[i] if label not in axes)]
        kept = list(out) if i == len(tensors) - 1 else [n for n in union if n in later]
        ellipsis = {label for label in union if isinstance(label, int)}
        names = (name, f"operands[{i}]")
        x = contract(op, fmt, names, x, axes, tensors[i], labels[i], kept, broadcast=ellipsis)
        axes, name = kept, "the product so far"
    return x


def _parse(op: str, subscripts: str, ranks: Sequence[int]):
    """Returns the labels of every operand and of the output; ints for the axes of `...`."""

    def fail(why: str):
        raise ValueError(f"keras_dfp.ops.{op}: subscripts {subscripts!r}: {why}.")

    text = subscripts.replace(" ", "").replace("...", "*")
    if set(text) - set(string.ascii_letters + "*,->") or text.count("->") > 1:
        fail("expected letters, '...', ',' and at most one '->'")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks):
        fail(f"{len(terms)} terms for {len(ranks)} operands")
    if any(term.count("*") > 1 for term in [*terms, output]) or set("->") & set(inputs + output):
        fail("expected letters, '...', ',' and at most one '->'")

    labels, depth = [], 0
    for i, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        hidden = rank - len(term.replace("*", ""))
        if hidden < 0 or (hidden and "*" not in term):
            fail(f"term {i} does not fit operands[{i}] of rank {rank}")
        before, _, after = term.partition("*")
        labels.append([*before, *range(-hidden, 0), *after])
        depth = max(depth, hidden)
    if not arrow:
        # In the order of appearance: Keras calls its labels a, b, c, ... before they are sorted.
        output = "*" + "".join(c for c in inputs if c not in ",*" and inputs.count(c) == 1)
    before, star, after = output.partition("*")
    out = [*before, *range(-depth, 0), *after]
    if depth and not star:
        fail("the output needs '...', because the operands have axes under theirs")
    if len(set(out)) < len(out) or set(out) - {label for axes in labels for label in axes}:
        fail("the output must name labels of the operands, each once")
    return labels, out


def _diagonal(x, axes):
    """Takes the diagonal of axes that share a label."""
    kept = list(dict.fromkeys(axes))
    letters = dict(zip(kept, string.ascii_letters, strict=False))
    spec = f"{''.join(letters[n] for n in axes)}->{''.join(letters[n] for n in kept)}"
    return tf.einsum(spec, tf.convert_to_tensor(x)), kept
