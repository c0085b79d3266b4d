"""A network's convolutions and dense layers, each distinct one in its three passes.

Quantizing is timed apart. Its time belongs to the pass that needs an operand first: the gradients
reuse the x and w of the forward pass, and share dy.
"""

from __future__ import annotations

from collections.abc import Iterator

from keras_dfp.benchmarks import products
from keras_dfp.benchmarks.machine import medians
from keras_dfp.benchmarks.networks import Layer, layers
from keras_dfp.benchmarks.run import Doing

QUANTISED = {"forward": "xw", "input gradient": "d", "weight gradient": ""}
# Of a network's first layer, whose input needs no gradient.
QUANTISED_FIRST = {"forward": "xw", "weight gradient": "d"}


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per layer and pass; settings: network, batch, image_size, kinds, against,
    repeats."""
    found = layers(settings["network"], settings["image_size"])
    first = next(iter(found))
    wanted_layers = [layer for layer in found if layer.kind in settings["kinds"]]
    for done, layer in enumerate(wanted_layers):
        yield Doing(f"{settings['network']} {layer}", done / len(wanted_layers))
        passes, (x, w, dy) = _passes(layer, settings["batch"], settings["against"])
        tensors = {"x": x, "w": w, "d": dy}
        for name, wanted in (QUANTISED_FIRST if layer == first else QUANTISED).items():
            operands = [tensors[letter] for letter in wanted]
            product = passes[name]
            # A default argument, because the loop goes on before the function is called.
            ways = {
                **product.ways,
                "quantize": lambda operands=operands: [t.quantize() for t in operands],
            }
            taken = medians(ways, settings["repeats"])
            if not operands:
                taken["quantize"] = 0.0
            yield {
                "layer": str(layer),
                "kind": layer.kind,
                "count": found[layer],
                "pass": name,
                "macs": product.macs,
                "bytes": product.bytes,
                **{f"{way}_ms": ms for way, ms in taken.items()},
            }


def _passes(layer: Layer, batch: int, against):
    if layer.kind == "dense":
        inputs, outputs = layer.w
        return products.dense(batch, inputs, outputs, against)
    depthwise = layer.kind == "depthwise"
    x = (batch, *layer.x)
    return products.convolution(x, layer.w, layer.strides, layer.padding, depthwise, against)
