"""Names by which native ops know layers; the warning of what an operand loses when quantized."""

from __future__ import annotations

import atexit
import glob
import itertools
import warnings
import weakref
from collections.abc import Iterable

import keras

from keras_dfp.backend.per_layer import PerLayer
from keras_dfp.native import extension

_serials = itertools.count(1)
_sites = PerLayer()
# From a site to the path of its layer, for as long as that lives.
_paths: dict[str, str] = {}
_told: set[str] = set()


def site_of(layer: keras.layers.Layer) -> str:
    """Returns what native ops know a layer by."""
    path = layer.path or layer.name
    known, site = _sites.get(layer, ("", ""))
    if known != path:
        # A new one, also of a layer whose path has changed: its graphs go on under the old one.
        site = f"#{next(_serials)}"
        _paths[site] = path
        _sites[layer] = path, site
        weakref.finalize(layer, _forget, site).atexit = False
    return site


def _forget(site: str) -> None:
    _paths.pop(site, None)
    _told.discard(site)


def paths_of(site: str) -> list[str]:
    """Returns the paths of the layers that a native op's site names: those that share an operand.

    What a SavedModel of another process brings is nobody's.
    """
    return [_paths[name] for name in site.split(",") if name in _paths]


def paths_in_order(sites: Iterable[str]) -> list[str]:
    """Returns the paths of layers by what native ops call them, in the order in which they first
    multiplied."""
    names = {name for site in sites for name in site.split(",")}
    return list(dict.fromkeys(path for name, path in _paths.items() if name in names))


def _tell(site: str, share: float, nonzero: int) -> None:
    """Warns, once for each layer, that much of an operand became zero."""
    first = site.partition(",")[0]
    if first in _told or first not in _paths:
        return
    _told.add(first)
    path = _paths[first]
    pattern = glob.escape(path)
    warnings.warn(
        f"keras_dfp: layer '{path}' loses much of an input: of {nonzero} nonzero values that "
        f"share an exponent, {int(share * nonzero)} are so much smaller than the largest that they "
        "became zero. If they matter (an outlier or padding may be what hides them), keep the "
        f"layer in float32 with exclude=[{pattern!r}], or give it "
        f"overrides={{{pattern!r}: {{'mantissa_bits': 16}}}}. keras_dfp.audit(model, x) measures "
        "the error.",
        stacklevel=2,
    )


extension.set_loss_handler(_tell)
# Threads of TensorFlow's may outlive Python.
atexit.register(extension.set_loss_handler, None)
