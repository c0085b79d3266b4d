"""Steps that follow each other run as one pass over memory: a rewriting of finished graphs.

A layer's product wants int16; what comes before it is a chain of float32 steps, each of which would
read and write the whole tensor. So would the steps of its gradient:

    forward     x -> [batch norm | bias] -> [residual sum] -> [activation] -> DfpQuantize
    backward    [AddN ->] [activation's gradient] -> [gradient of batch norm] -> DfpQuantize

An activation is a ReLU, a ReLU6 or a SiLU.

Layers, gradients and everything in Python see these steps and nothing else. Only when TensorFlow
makes a function of a graph, which is then complete, `fused` looks for such chains, adds ops that do
a chain in one pass (`DfpNormalize`, `DfpNormalizeSums`, `DfpNormalizeGradient`, with more inputs
and outputs than a step has) and lets the readers of a chain read these. TensorFlow drops what is
not read any more: a float that only a chain reads is never made. Afterwards all edges are put back,
so that the graph can be differentiated as before. A bias right after a product is added by the
product (`DfpConvBias`, `DfpMatmulBias`), its gradient summed by what quantizes; and where the float
of a ReLU after it is read, by a pooling perhaps, the product clips what it stores.

A fused op does the arithmetic of the steps, in their order, each operation rounded as theirs is. So
it changes no bit, and there is nothing to fuse where there is no graph.

An operand's token would keep the float alive: it names the fused op's float output instead, which
is empty if nobody else wants it. So a function that comes back as a graph (a loaded SavedModel) has
its gradients still.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import tensorflow as tf

from keras_dfp.native import lib
from keras_dfp.normalization import is_silu_gradient

_CLIPS = {"Relu": "relu", "Relu6": "relu6"}
# Ops that ask for a tensor's sizes and not for what is in it.
SIZES = ("Shape", "ShapeN", "Size", "Rank")
_MASKS = {"ReluGrad": "relu", "Relu6Grad": "relu6"}
_MAX_POOLING_GRADIENTS = ("MaxPoolGrad", "MaxPool3DGrad")
# The products that add a bias as they store their result.
_BIASED = {"DfpConvBias": lib.dfp_conv_bias, "DfpMatmulBias": lib.dfp_matmul_bias}
# What a DfpNormalizeGradient takes: tensors that it adds, channels that it sums.
_MOST_PARTS = 8
_MOST_CHANNELS = 4096
# How a DfpQuantize rounds; its successor is told the same.
_QUANTIZE_ATTRS = (
    *("mantissa_bits", "rounding", "seed", "tensor_id", "group_axes"),
    *("site", "role", "watched"),
)


@contextlib.contextmanager
def fused(graph: tf.Graph) -> Iterator[None]:
    """Fuses chains of a graph inside the `with` block.

    Args:
        graph: The graph of a function, complete.
    """
    rewriting = _Rewriting(graph)
    try:
        rewriting.run()
        yield
    finally:
        rewriting.undo()


@dataclasses.dataclass(frozen=True)
class Chain:
    """The steps that a tensor comes from: `activation(normalised x + residual)`.

    Attributes:
        x: What the steps begin with.
        parameters: Offset, mean, variance and scale of batch norm; of a bias the offset alone;
            neither: nothing.
        residual: What a residual sum adds, one tensor or none.
        activation: `"relu"`, `"relu6"`, `"silu"` or `"none"`.
        epsilon: That of batch norm.
        training: Whether its statistics are those of x.
        steps: How many steps there are.
    """

    x: tf.Tensor
    parameters: tuple[tf.Tensor, ...]
    residual: tuple[tf.Tensor, ...]
    activation: str
    epsilon: float
    training: bool
    steps: int

    @property
    def saved(self) -> str:
        """What the activation's gradient asks: the chain's `"x"`, `"bits"`, or its `"result"`.

        Without a residual, it computes anew what it needs, from what the steps begin with. Bits say
        where the result is positive; a ReLU6 asks for more. That of a SiLU asks for what comes
        before it, not for its result: `"sum"`.
        """
        if not self.residual:
            return "x"
        if self.activation == "silu":
            return "sum"
        if self.activation != "relu" or (self.x.shape[-1] or 1) % 8:
            return "result"
        return "bits"


def chain_of(tensor: tf.Tensor) -> Chain | None:
    """Returns the steps that a tensor of a graph comes from, None if there are none."""
    op, activation, steps = tensor.op, activation_of(tensor.op), 0
    residual: tuple[tf.Tensor, ...] = ()
    parameters: Sequence[tf.Tensor] = ()
    epsilon, training = 0.0, False
    if activation != "none":
        tensor, steps = op.inputs[0], 1
        op = tensor.op
    if _is_step(op) and op.get_attr("n_residual"):
        tensor, other = op.inputs
        if _has_parameters(other.op) and not _has_parameters(tensor.op):
            tensor, other = other, tensor
        residual, steps = (other,), steps + 1
        op = tensor.op
    if _has_parameters(op):
        tensor, *parameters = op.inputs
        epsilon, training, steps = op.get_attr("epsilon"), op.get_attr("training"), steps + 1
    if not steps or tensor.dtype != tf.float32 or (tensor.shape.rank or 0) < 2:
        return None
    return Chain(tensor, tuple(parameters), residual, activation, epsilon, training, steps)


def activation_of(op: tf.Operation) -> str:
    """Returns which activation an op is, and is nothing else: a ReLU or a SiLU, or `"none"`."""
    if _is_native(op) and op.get_attr("n_parameters") == op.get_attr("n_residual") == 0:
        return op.get_attr("activation").decode()
    return _CLIPS.get(op.type, "none")


class _Rewriting:
    def __init__(self, graph):
        self.graph = graph
        self._results = {id(t) for t in graph.outputs}
        self._edges = []  # (op, index, the tensor it read), in the order of change
        self._readers = {}  # from a tensor's id to the (op, index) that read it
        self._moved = {}  # from a tensor's id to the one that is read in its place
        self._empty = {}  # from a tensor's id to an output that stands for it and has no elements
        self._again = []  # fused ops whose mantissas are cheap to compute, and their arguments
        self._tokens = []  # ops that say what was quantized, and read no float of it
        self._masks = {}  # from the gradient of an activation to the steps that this ends
        self._bits = {}  # from the id of a ReLU's result to where it is positive, None before

    # ---- the graph -------------------------------------------------------------------------------

    def run(self):
        ops = self.graph.get_operations()
        if not any(op.type in ("DfpToken", "DfpNormalize") for op in ops):
            return
        ops = self._live(ops)
        for op in ops:
            if op.type == "DfpToken":
                self._tokens.append(op)
                self._register(op, first=1)
            else:
                self._register(op)
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope(""):
            for op in ops:
                if op.type == "DfpNormalize":
                    self._fuse_bias(op)
            self._find_masks(ops)
            for op in reversed(ops):
                if op.type in _CLIPS or op.type == "DfpNormalize":
                    self._fuse_forward(op.outputs[0])
            for op, chain in self._masks.items():
                self._fuse_mask(op, chain)
            for op in ops:
                if op.type == "DfpQuantize":
                    self._fuse_gradient(op)
            for new, arguments in self._again:
                self._compute_again(new, arguments)
            for op in ops:
                if op.type in _CLIPS:
                    self._fuse_clip(op)
                elif op.type in _MAX_POOLING_GRADIENTS:
                    self._pooled_again(op)
            self._place_tokens()

    def undo(self):
        for op, index, tensor in reversed(self._edges):
            op._update_input(index, tensor)

    def _live(self, ops):
        """Returns the ops that have an effect."""
        roots = [t.op for t in self.graph.outputs] + list(self.graph.control_outputs)
        found = set()
        stack = roots + [op for op in ops if op._is_stateful or not op.outputs]
        while stack:
            op = stack.pop()
            if op not in found:
                found.add(op)
                stack += [t.op for t in op.inputs]
                stack += op.control_inputs
        return [op for op in ops if op in found]

    def _register(self, op, first=0):
        for index, tensor in enumerate(op.inputs[first:], first):
            self._readers.setdefault(id(tensor), []).append((op, index))

    def _readers_of(self, tensor):
        return self._readers.get(id(tensor), [])

    def _is_read(self, op) -> bool:
        return any(self._readers_of(t) or id(t) in self._results for t in op.outputs)

    def _redirect(self, tensor, new, readers=None):
        """Lets the readers of a tensor, or these, read another one."""
        moved = self._readers_of(tensor) if readers is None else readers
        for op, index in moved:
            op._update_input(index, new)
            self._edges.append((op, index, tensor))
        self._moved[id(tensor)] = new
        self._readers.setdefault(id(new), []).extend(moved)
        self._readers[id(tensor)] = [r for r in self._readers_of(tensor) if r not in moved]
        self._drop(tensor.op)

    def _drop(self, op):
        """Forgets what an op reads once nobody reads it."""
        if op.type.startswith(("Relu", "AddN", "DfpNormalize", "DfpQuantize")) and not (
            self._is_read(op)
        ):
            for index, tensor in enumerate(op.inputs):
                if (op, index) in self._readers_of(tensor):
                    self._readers[id(tensor)].remove((op, index))
                    self._drop(tensor.op)

    @contextlib.contextmanager
    def _in_place_of(self, op):
        """Where an op belongs that takes another one's place."""
        with tf.device(op.device), tf.name_scope(op.name + "/fused/"):
            yield

    # ---- tokens ----------------------------------------------------------------------------------

    def _place_tokens(self):
        """Lets tokens read what has come in the place of their tensors."""
        for token in self._tokens:
            old = new = token.inputs[0]
            while id(new) not in self._results:
                place = self._moved.get(id(new))
                place = self._empty.get(id(new)) if place is None else place
                if place is None:
                    break
                new = place
            if new is not old:
                self._edges.append((token, 0, old))
                token._update_input(0, new)

    # ---- forward ---------------------------------------------------------------------------------

    def _fuse_bias(self, op):
        """Lets a product add the bias itself, as it stores its result."""
        if not _is_step(op) or op.get_attr("n_parameters") != 1 or not self._is_read(op):
            return
        x, bias = op.inputs
        product = x.op
        make = _BIASED.get(product.type + "Bias")
        if (
            make is None
            or self._readers_of(x) != [(op, 0)]
            or id(x) in self._results
            or (product.type == "DfpConv" and product.get_attr("depthwise"))
        ):
            return
        with self._in_place_of(product):
            y = make(*product.inputs, bias=bias, **_attrs_of(product))
        y.set_shape(x.shape)
        self._register(y.op)
        self._redirect(op.outputs[0], y)

    def _fuse_clip(self, op):
        """Lets a product that adds a bias clip what it stores.

        That is what the ReLU's own gradient may read as well: it asks where its input is above 0
        (and from 6 on), and there clipping changes nothing.
        """
        x, y = op.inputs[0], op.outputs[0]
        product, clip = x.op, _CLIPS[op.type]
        make = _BIASED.get(product.type)
        readers = [reader for reader in self._readers_of(x) if reader[0] is not op]
        if (
            make is None
            or product.get_attr("clip") != b"none"
            or not self._is_read(op)
            or id(x) in self._results
            or id(y) in self._results
            or not all(_is_masked_by(*reader, clip) for reader in readers)
        ):
            return
        with self._in_place_of(op):
            new = make(*product.inputs, **{**_attrs_of(product), "clip": clip})
        new.set_shape(x.shape)
        self._register(new.op)
        self._redirect(y, new)
        self._redirect(x, new, readers)

    def _fuse_forward(self, y):
        """Computes what comes from a chain of steps in one pass: for products, and for others."""
        chain = chain_of(y)
        needs_mask = id(y) in self._bits
        if chain is None or not (needs_mask or self._is_read(y.op)):
            return
        readers = self._readers_of(y)
        quantizer = next((op for op, _ in readers if _is_quantizer(op)), None)
        others = [(op, index) for op, index in readers if op is not quantizer]
        needs_y = bool(others) and id(y) not in self._results
        if quantizer is None and not needs_mask and (chain.steps == 1 or not needs_y):
            return
        how, step = _rounding(quantizer)
        arguments = dict(
            x=chain.x,
            parameters=chain.parameters,
            residual=chain.residual,
            bounds=self._bounds(chain, how) if quantizer and not needs_y else [],
            step=step,
            activation=chain.activation,
            epsilon=chain.epsilon,
            training=chain.training,
            want_y=needs_y,
            want_q=quantizer is not None,
            want_mask=needs_mask,
            fused=False,
            **how,
        )
        with self._in_place_of(y.op):
            new = lib.dfp_normalize(**arguments)
        self._register(new.y.op)
        if arguments["bounds"]:
            self._again.append((new, arguments))
        if needs_mask:
            self._bits[id(y)] = new.mask
        if needs_y:
            self._redirect(y, new.y, others)
        if quantizer:
            self._requantize(quantizer, new)

    def _compute_again(self, new, arguments):
        """Lets weight gradients compute mantissas again instead of keeping them.

        Batch norm's gradient needs x, so it is there; from it, with exponents from bounds,
        mantissas are one read of x and one write away: 1 % of a step of ResNet-50, and 4 % of its
        memory.
        """
        readers = [r for r in self._readers_of(new.q) if r[0].type != "DfpToken"]
        late = [
            (op, index)
            for op, index in readers
            if op.type == "DfpConvBackpropFilter" and index == 0
        ]
        if not late or len(late) == len(readers):
            return
        arguments = {**arguments, "site": ""}
        gradient = late[0][0].inputs[4].op  # what dy's mantissas come from
        with self._in_place_of(new.q.op), tf.control_dependencies([gradient]):
            again = lib.dfp_normalize(**arguments)
        self._register(again.y.op)
        self._redirect(new.q, again.q, late)
        self._redirect(new.e, again.e, [(op, 1) for op, _ in late])

    def _pooled_again(self, op):
        """Computes what was pooled again, from the input of a batch norm, instead of keeping it.

        That is mostly the largest float of a network: 3 % of the memory of ResNet-50.
        """
        pooled, _, dy = op.inputs
        padded = pooled.op.type == "Pad"
        norm = pooled.op.inputs[0].op if padded else pooled.op
        if (
            norm.type != "DfpNormalize"
            or norm.get_attr("n_parameters") != 4
            or norm.get_attr("n_residual")
        ):
            return
        x, *parameters = norm.inputs[:5]
        with self._in_place_of(op), tf.control_dependencies([dy.op]):
            again = lib.dfp_normalize(
                x=x, parameters=parameters, residual=[], bounds=[], step=[], fused=False,
                **{name: norm.get_attr(name) for name in ("activation", "epsilon", "training")},
            ).y  # fmt: skip
            if padded:
                again = tf.pad(again, pooled.op.inputs[1])
        again.set_shape(pooled.shape)
        self._register(again.op)
        self._redirect(pooled, again, [(op, 0)])

    def _bounds(self, chain, how) -> list:
        """Returns the extremes of images, whose exponents follow from them, if they are known."""
        if chain.residual or chain.x.shape.rank == 2 or how["group_axes"] != 1:
            return []
        # In the graph of a loop or a branch, moments may be what was captured.
        moments = chain.parameters[1].op if chain.training else None
        return [moments.outputs[2]] if moments and moments.type == "DfpMoments" else []

    def _requantize(self, quantizer, new):
        self._empty[id(quantizer.inputs[0])] = new.y
        q, exponent = quantizer.outputs[:2]
        new.e.set_shape(exponent.shape)
        self._redirect(q, new.q)
        self._redirect(exponent, new.e)

    # ---- backward --------------------------------------------------------------------------------

    def _find_masks(self, ops):
        """Finds the gradients of activations that need not read what TensorFlow gives them.

        That is the result of a ReLU, and what comes before a SiLU.
        """
        for op in ops:
            silu = is_silu_gradient(op) and op.get_attr("fused")
            if not silu and op.type not in _MASKS:
                continue
            chain = _before_silu(op.inputs[1]) if silu else chain_of(op.inputs[1])
            if chain is None or chain.activation != ("silu" if silu else _MASKS[op.type]):
                continue
            # A ReLU alone, before what has another policy, is left alone.
            readers = self._readers_of(op.inputs[1])
            if (
                chain.steps == 1
                and (silu or not any(_is_quantizer(reader) for reader, _ in readers))
                and not all(_takes_gradient(*reader) for reader in self._readers_of(op.outputs[0]))
            ):
                continue
            if chain.saved == "result":
                continue
            if chain.saved == "bits":
                self._bits[id(op.inputs[1])] = None
            self._masks[op] = chain
            if chain.x is not op.inputs[1]:
                readers.remove((op, 1))

    def _fuse_mask(self, op, chain):
        """Joins an activation's gradient, and the sum of gradients before it, with its readers."""
        if not self._is_read(op):
            return
        dy, y = op.inputs
        arguments = {
            **self._parts(dy, op),
            "mask_map": [self._moved.get(id(chain.x), chain.x), *chain.parameters],
            "mask_bits": [],
            "activation": chain.activation,
            "mask_epsilon": chain.epsilon,
        }
        if chain.residual:
            arguments.update(mask_map=[], mask_bits=[self._bits[id(y)]])
        masked = op.outputs[0]
        if id(masked) not in self._results and all(
            _takes_gradient(reader, index) for reader, index in self._readers_of(masked)
        ):
            for reader, _ in sorted(
                self._readers_of(masked), key=lambda reader: reader[0].type != "DfpQuantize"
            ):
                if self._is_read(reader):
                    self._absorb(reader, arguments)
            return
        with self._in_place_of(op):
            new = _gradient(**arguments)
        self._register(new.y.op)
        self._redirect(masked, new.y)

    def _parts(self, dy, reader) -> dict:
        """Returns the tensors whose sum dy is, if only `reader` reads it."""
        if (
            dy.op.type == "AddN"
            and (dy.shape.rank or 0) >= 2
            and len(dy.op.inputs) <= _MOST_PARTS
            and self._readers_of(dy) == [(reader, 0)]
            and id(dy) not in self._results
        ):
            return {"parts": list(dy.op.inputs)}
        return {"parts": [dy]}

    def _absorb(self, reader, arguments):
        """Lets a reader of a masked gradient mask it itself."""
        if reader.type == "DfpQuantize":
            self._quantize_gradient(reader, arguments)
            return
        with self._in_place_of(reader):
            if reader.type == "DfpNormalizeSums":
                norm, epsilon = list(reader.inputs[1:]), reader.get_attr("epsilon")
                new = lib.dfp_normalize_sums(norm=norm, epsilon=epsilon, **arguments)
            else:
                new = _gradient(**{**_arguments_of(reader), **arguments})
        self._register(new[0].op)
        for old, better in zip(reader.outputs, new, strict=True):
            self._redirect(old, better)

    def _fuse_gradient(self, quantizer):
        """Gives the gradient of batch norm, or a sum of gradients, as mantissas."""
        if not _is_quantizer(quantizer) or not self._is_read(quantizer):
            return
        x = quantizer.inputs[0]
        sums = self._bias_sums(quantizer)
        parts = self._parts(x, quantizer)
        if x.op.type == "DfpNormalizeGradient" and x.op.get_attr("fused"):
            others = [r for r in self._readers_of(x) if r[0] not in (quantizer, sums)]
            if id(x) in self._results:
                others = []
            self._quantize_gradient(quantizer, _arguments_of(x.op), others)
        elif len(parts["parts"]) > 1 or sums is not None:
            self._quantize_gradient(quantizer, parts)

    def _quantize_gradient(self, quantizer, arguments, others=()):
        """Lets what computes a gradient give its mantissas, and its sums for a bias.

        Args:
            quantizer: The DfpQuantize of the gradient.
            arguments: Those of the DfpNormalizeGradient that computes it.
            others: The readers that get the float from there too.
        """
        x = quantizer.inputs[0]
        how, step = _rounding(quantizer)
        sums = self._bias_sums(quantizer)
        with self._in_place_of(quantizer):
            new = _gradient(
                **{**arguments, "step": step}, want_y=bool(others), want_q=True,
                want_doffset=sums is not None, **how,
            )  # fmt: skip
        self._register(new.y.op)
        if sums is not None:
            self._redirect(sums.outputs[0], new.doffset)
        if others:
            self._redirect(x, new.y, others)
        self._requantize(quantizer, new)

    def _bias_sums(self, quantizer):
        """Returns the op that sums a gradient of images for a bias: quantizing can do it."""
        x = quantizer.inputs[0]
        if quantizer.get_attr("group_axes") != 1 or x.shape.rank == 2:
            return None
        if not 0 < (x.shape[-1] or 0) <= _MOST_CHANNELS:
            return None
        for op, index in self._readers_of(x):
            if op.type == "DfpNormalizeSums" and index == 0 and _is_plain(op):
                if op.get_attr("n_norm") == 0:
                    return op
        return None


def _attrs_of(op) -> dict:
    return {a.name: op.get_attr(a.name) for a in op.op_def.attr}


def _before_silu(x) -> Chain:
    """Returns the steps that a SiLU of x ends; of a residual sum, the SiLU alone."""
    chain = chain_of(x)
    if chain is None or chain.residual or chain.activation != "none":
        return Chain(x, (), (), "silu", 0.0, False, steps=1)
    return dataclasses.replace(chain, activation="silu", steps=chain.steps + 1)


def _is_masked_by(op, index, clip) -> bool:
    """Tells whether an op reads an input only to ask where the gradient of a ReLU is not zero."""
    if op.type not in ("DfpNormalizeGradient", "DfpNormalizeSums"):
        return False
    return (
        op.get_attr("n_mask_map") == 1
        and index == op.get_attr("n_parts")
        and op.get_attr("activation").decode() == clip
    )


def _is_native(op) -> bool:
    """Tells whether an op is a DfpNormalize as `normalization` makes it, that may be fused."""
    return op.type == "DfpNormalize" and op.get_attr("fused")


def _is_step(op) -> bool:
    """Tells whether an op is batch norm, a bias or a residual sum, that may be fused."""
    return _is_native(op) and op.get_attr("activation") == b"none"


def _has_parameters(op) -> bool:
    return _is_step(op) and op.get_attr("n_parameters") > 0 and not op.get_attr("n_residual")


def _is_quantizer(op) -> bool:
    return (
        op.type == "DfpQuantize"
        and op.get_attr("fused")
        and not (op.get_attr("n_counts") or op.get_attr("n_exponent"))
    )


def _takes_gradient(op, index) -> bool:
    """Tells whether an op's gradient input can be masked and summed by the op itself."""
    if op.type == "DfpNormalizeGradient":
        return index == 0 and op.get_attr("fused") and _is_plain(op)
    return index == 0 and ((op.type == "DfpNormalizeSums" and _is_plain(op)) or _is_quantizer(op))


def _is_plain(op) -> bool:
    return op.get_attr("n_parts") == 1 and not (
        op.get_attr("n_mask_map") or op.get_attr("n_mask_bits")
    )


def _rounding(quantizer) -> tuple[dict, list]:
    """Returns how a DfpQuantize rounds: attributes, and the step of its noise."""
    if quantizer is None:
        return {}, []
    how = {name: quantizer.get_attr(name) for name in _QUANTIZE_ATTRS}
    return how, list(quantizer.inputs[1:])


def _arguments_of(op) -> dict:
    """Returns what a DfpNormalizeGradient computes, as its arguments."""
    lists = ("parts", "mask_map", "mask_bits", "norm", "sums")
    inputs = iter(op.inputs)
    return {
        **{name: [next(inputs) for _ in range(op.get_attr(f"n_{name}"))] for name in lists},
        **{name: op.get_attr(name) for name in ("activation", "epsilon", "mask_epsilon")},
    }


def _gradient(**arguments):
    """Makes a DfpNormalizeGradient; lists that are not given are empty."""
    lists = dict(mask_map=[], mask_bits=[], norm=[], sums=[], step=[])
    return lib.dfp_normalize_gradient(**{**lists, **arguments})
