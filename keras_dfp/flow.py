"""Where the operands of a traced model come from, and what of them the backward pass needs.

`describe` asks. All answers are read from the graph that `backend.recording` traced: `fusion` says
which steps end in a product's operand, the shapes say how large things are. A graph knows shapes,
not samples; `Flow` counts how many indices of a tensor's unknown axis belong to one sample, and
answers `None` where that cannot be told.
"""

from __future__ import annotations

import math
from fractions import Fraction

import keras
import tensorflow as tf

from keras_dfp.backend.recording import Recording
from keras_dfp.fusion import SIZES, Chain, activation_of, chain_of
from keras_dfp.internals import ControlFlowFuncGraph
from keras_dfp.operand import Quantized

_ACTIVATIONS = {"relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU"}
_NAMES = {
    "Placeholder": "input",
    **dict.fromkeys(("MaxPool", "MaxPoolV2", "MaxPool3D"), "max pooling"),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), "average pooling"),
    **dict.fromkeys(("Concat", "ConcatV2"), "concatenation"),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), "padding"),
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), "reshape"),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), "resizing"),
    **dict.fromkeys(("GatherV2", "ResourceGather"), "gather"),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV3"), "TensorFlow's batch norm"),
    "TensorListGetItem": "step of a sequence",
    "Transpose": "transpose",
    "Mean": "mean",
    "Max": "maximum",
    "Sum": "sum",
    "Softmax": "softmax",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Elu": "ELU",
    "Selu": "SELU",
    "LeakyRelu": "leaky ReLU",
    "Relu": "ReLU",
    "Relu6": "ReLU6",
    "Softplus": "softplus",
}
# What says little of its own: the layer that made it says more.
_PLAIN = {"Mul": "multiplication", "Add": "sum", "AddV2": "sum", "AddN": "sum", "Sub": "difference"}
_PRODUCTS = ("DfpConv", "DfpMatmul", "MatMul", "BatchMatMul", "Conv", "DepthwiseConv", "Einsum")
_SAME = ("Cast", "Identity", "IdentityN", "StopGradient", "PreventGradient")
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "ExpandDims")
# Layers whose `activation` is the last of what they do.
_ACTIVATING = (
    keras.layers.Activation,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)


class Flow:
    """What flows through a traced model.

    Args:
        recorded: What `recording.trace` returned.
    """

    def __init__(self, recorded: Recording):
        self._makers = recorded.makers
        self._graph = recorded.graph
        self._ops = recorded.graph.get_operations()
        captured = {id(inner) for _, inner in recorded.graph.captures}
        self._inputs = [
            op.outputs[0]
            for op in self._ops
            if op.type == "Placeholder" and id(op.outputs[0]) not in captured
        ]
        self._batch = self._static_batch()
        self._indices = self._indices_per_sample()

    # ---- where an operand comes from -------------------------------------------------------------

    def is_activation(self, tensor: tf.Tensor) -> bool:
        """Tells whether a tensor depends on the model's inputs; if unknown, it does."""
        return tensor.graph is not self._graph or id(tensor) in self._indices

    def origin(self, found: Quantized, layer: keras.layers.Layer | None) -> str:
        """Returns what an operand comes from, in words.

        Args:
            found: The operand.
            layer: The layer that multiplies it.
        """
        if not found.fused:
            return "float: fused=False"
        chain = chain_of(found.x)
        if chain is None:
            return f"float: {self._source(found.x, layer)}"
        if _first_quantized(found.x) is not found.mantissas.op:
            return "float: quantized in another format too"
        words = ", ".join(_words(chain))
        source = self._source(chain.x, layer)
        return words if source == "product" else f"{words} (after {source})"

    def _source(self, tensor, layer) -> str:
        while tensor.op.type in _SAME:
            tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
        laid_out = tensor
        while laid_out.op.type in _LAYOUT:
            laid_out = laid_out.op.inputs[0]
        if laid_out.op.type.startswith(_PRODUCTS) and chain_of(laid_out) is None:
            return "product"
        op = tensor.op
        if op.type == "Placeholder" and isinstance(tensor.graph, ControlFlowFuncGraph):
            return "state of a loop"
        if op.type in _NAMES:
            return _NAMES[op.type]
        maker = self._makers.get(op)
        activation = getattr(maker, "activation", None)
        if isinstance(maker, _ACTIVATING) and activation not in (None, keras.activations.linear):
            return getattr(activation, "__name__", type(activation).__name__)
        chain = chain_of(tensor)
        if chain is not None:
            return ", ".join(_words(chain))
        if maker not in (None, layer) and not isinstance(maker, keras.Model):
            return type(maker).__name__
        return _PLAIN.get(op.type, op.type)

    # ---- what is kept ----------------------------------------------------------------------------

    def mantissa_bytes(self, found: Quantized) -> int | None:
        """Returns the bytes of an operand's mantissas, per sample."""
        return self._bytes(found.expanded, found.x, 2)

    def normalization_bytes(self, x: tf.Tensor) -> int | None:
        """Returns the bytes of the input of a batch norm, per sample."""
        return self._bytes(x, x, 4)

    def float_inputs(self) -> list[tf.Tensor]:
        """Returns the float32 tensors that native batch norm and activations keep, each once."""
        kept = {}
        for op in self._native_steps():
            tensor = None
            if activation_of(op) == "none":
                if op.get_attr("n_parameters") == 4:
                    tensor = op.inputs[0]
            elif (chain := chain_of(op.outputs[0])) is not None:
                saved = {"x": chain.x, "sum": op.inputs[0], "result": op.outputs[0]}
                tensor = saved.get(chain.saved)
            if tensor is not None:
                kept[id(tensor)] = tensor
        return list(kept.values())

    def float_bytes(self) -> list[int | None]:
        """Returns the bytes of each of `float_inputs`, per sample."""
        return [self._bytes(tensor, tensor, 4) for tensor in self.float_inputs()]

    def mask_bytes(self) -> list[int | None]:
        """Returns the bytes of each mask at the end of a residual block, per sample."""
        results = [
            op.outputs[0]
            for op in self._native_steps()
            if activation_of(op) != "none"
            and (chain := chain_of(op.outputs[0])) is not None
            and chain.saved == "bits"
        ]
        return [self._bytes(y, y, Fraction(1, 8)) for y in results]

    def _native_steps(self):
        """Returns the batch norms, biases, sums and activations that `fusion` looks at."""
        if not any(op.type in ("DfpToken", "DfpNormalize") for op in self._ops):
            return []
        return [
            op
            for op in self._ops
            if op.type in ("DfpNormalize", "Relu", "Relu6") and id(op.outputs[0]) in self._indices
        ]

    def _bytes(self, tensor, source, size) -> int | None:
        """Returns the bytes of a tensor per sample; `source` is what its elements come from."""
        shape = tensor.shape
        if tensor.graph is not self._graph or shape.rank is None:
            return None
        if self._batch is not None:
            if not shape.is_fully_defined():
                return None
            return math.ceil(size * Fraction(shape.num_elements(), self._batch))
        indices = self._indices.get(id(source))
        if indices is None or _elements(shape) is None:
            return None
        return math.ceil(size * indices * _elements(shape))

    def _static_batch(self) -> int | None:
        """Returns the number of samples that the model was traced with, None if it is unknown."""
        sizes = {tensor.shape[0] for tensor in self._inputs if tensor.shape.rank}
        return sizes.pop() or None if len(sizes) == 1 else None

    def _indices_per_sample(self) -> dict[int, Fraction | None]:
        """Returns for what depends on the inputs how many indices of its unknown axis a sample has.

        That is one, until a reshape joins the axis of samples with others.
        """
        found: dict[int, Fraction | None] = {id(tensor): Fraction(1) for tensor in self._inputs}
        for op in self._ops:
            inputs = [t for t in op.inputs if id(t) in found]
            if not inputs or op.type in SIZES:
                continue
            indices = [n for t in inputs if (n := found[id(t)]) is not None]
            most = max(indices) if len(indices) == len(inputs) else None
            if op.type == "Reshape" and most is not None:
                before, after = _elements(op.inputs[0].shape), _elements(op.outputs[0].shape)
                most = most * before / after if before and after else None
            found.update((id(t), most) for t in op.outputs)
        return found


def _elements(shape) -> int | None:
    """Returns how many elements an index of the one unknown axis has, None if there is no such."""
    if shape.rank is None or shape.as_list().count(None) != 1:
        return None
    return math.prod(n for n in shape.as_list() if n is not None)


def _first_quantized(tensor) -> tf.Operation | None:
    """Returns the op that quantizes a tensor in one pass with the steps it comes from."""
    quantizers = [
        op for op in tensor.consumers() if op.type == "DfpQuantize" and op.get_attr("fused")
    ]
    return quantizers[0] if quantizers else None


def _words(chain: Chain) -> list[str]:
    words = {4: ["batch norm"], 1: ["bias"], 0: []}[len(chain.parameters)]
    words += ["residual sum"] * len(chain.residual)
    return words if chain.activation == "none" else [*words, _ACTIVATIONS[chain.activation]]
