"""What an operand loses when it is quantised, told by the layer that multiplies it."""

from __future__ import annotations

import atexit
import itertools
import warnings

import keras

from keras_dfp.backend.per_layer import PerLayer
from keras_dfp.native import extension

_serials = itertools.count(1)
_sites = PerLayer()
# From a site to the path of its layer; what has been told is taken out.
_paths: dict[str, str] = {}


def site_of(layer: keras.layers.Layer) -> str:
    """Returns what the native quantiser knows a layer by."""
    path = layer.path or layer.name
    known, site = _sites.get(layer, ("", ""))
    if known != path:
        site = f"#{next(_serials)}"
        _paths[site] = path
        _sites[layer] = path, site
    return site


def _tell(site: str, share: float, nonzero: int) -> None:
    """Warns, once for each layer, that much of an operand became zero."""
    path = _paths.pop(site, None)
    if path is None:
        return
    warnings.warn(
        f"keras_dfp: layer '{path}' loses much of an input: of {nonzero} nonzero values that "
        f"share an exponent, {int(share * nonzero)} are so much smaller than the largest that they "
        "became zero. If they matter (an outlier or padding may be what hides them), keep the "
        f"layer in float32 with exclude=[{path!r}], or give it "
        f"overrides={{{path!r}: {{'mantissa_bits': 16}}}}. keras_dfp.audit(model, x) measures the "
        "error.",
        stacklevel=2,
    )


extension.set_loss_handler(_tell)
# Threads of TensorFlow's may outlive Python.
atexit.register(extension.set_loss_handler, None)
