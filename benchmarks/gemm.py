"""Matrix products of given sizes."""

from __future__ import annotations

from collections.abc import Iterator

from keras_dfp.benchmarks import products
from keras_dfp.benchmarks.machine import medians
from keras_dfp.benchmarks.run import Doing

# M, N, K: squares; then the products of an image's pixels with few channels, of a batch with
# VGG-16's first dense layer, and of that layer's weight gradient.
SIZES = (
    *((n, n, n) for n in (256, 512, 1024, 2048, 4096)),
    (100352, 64, 64),
    (100352, 64, 576),
    (32, 4096, 25088),
    (4096, 4096, 32),
)


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per size; settings: sizes, against, repeats."""
    sizes = settings["sizes"]
    for done, (m, n, k) in enumerate(sizes):
        yield Doing(f"{m}x{n}x{k}", done / len(sizes))
        a = products.Tensor((m, k), settings["against"], samples=True)
        b = products.Tensor((k, n), settings["against"], samples=False)
        product = products.matmul(a, b)
        ways = {**product.ways, "quantize": lambda a=a, b=b: (a.quantize(), b.quantize())}
        taken = medians(ways, settings["repeats"])
        yield {
            "m": m,
            "n": n,
            "k": k,
            "macs": product.macs,
            "bytes": product.bytes,
            **{f"{way}_ms": ms for way, ms in taken.items()},
        }
