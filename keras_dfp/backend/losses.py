"""What an operand loses when it is quantised, told by the layer that multiplies it."""

from __future__ import annotations

import itertools
import warnings
import weakref

import keras

from keras_dfp.native import extension

_serials = itertools.count(1)
_sites: weakref.WeakKeyDictionary[keras.layers.Layer, str] = weakref.WeakKeyDictionary()
_told: set[str] = set()


def site_of(layer: keras.layers.Layer) -> str:
    """Returns the name of a layer for the native quantiser: its path, and a number of its own."""
    path = layer.path or layer.name
    if layer not in _sites or _sites[layer].rpartition("#")[0] != path:
        _sites[layer] = f"{path}#{next(_serials)}"
    return _sites[layer]


def _tell(site: str, share: float, nonzero: int) -> None:
    """Warns, once for each layer, that much of an operand became zero."""
    if site in _told:
        return
    _told.add(site)
    path = site.rpartition("#")[0] or site
    warnings.warn(
        f"keras_dfp: layer '{path}' loses much of an input: {share:.0%} of the {nonzero} nonzero "
        "values that share an exponent are so much smaller than the largest of them that they "
        "became zero. If they matter (an outlier or a padding value may be what hides them), keep "
        f"the layer in float32 with exclude=[{path!r}], or give it "
        f"overrides={{{path!r}: {{'mantissa_bits': 16}}}}. keras_dfp.audit(model, x) measures the "
        "error.",
        stacklevel=2,
    )


extension.set_loss_handler(_tell)
