"""The products of the five networks: every distinct convolution and dense layer, one a line.

    conv 56x56x256 1x1/2 valid -> 512           image and channels, kernel/stride, padding, filters
    conv 27x27x96 5x5/1 same groups 2 -> 256
    depthwise 112x112x32 3x3/1 same
    dense 2048 -> 1000

`test_networks.py` compares the list with the models.
"""

import re

import keras
from kernels import Case

LAYER = re.compile(
    r"(conv|depthwise) (\d+)x(\d+)x(\d+) (\d+)x(\d+)/(\d+) (same|valid)(?: groups (\d+))?(?: -> (\d+))?"
)


def lines(model):
    """Returns the list of a model, in its own order."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            line = f"dense {layer.input.shape[-1]} -> {layer.units}"
        elif isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            (stride, other), (height, width) = layer.strides, layer.kernel_size
            assert stride == other and layer.dilation_rate == (1, 1)
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            line = "x".join(map(str, layer.input.shape[1:]))
            line += f" {height}x{width}/{stride} {layer.padding}"
            if depthwise:
                assert layer.depth_multiplier == 1
                line = f"depthwise {line}"
            else:
                groups = f" groups {layer.groups}" if layer.groups > 1 else ""
                line = f"conv {line}{groups} -> {layer.filters}"
        else:
            continue
        if line not in found:
            found.append(line)
    return found


def dense(line):
    """Returns (inputs, units) of a dense layer's line."""
    return tuple(map(int, line.removeprefix("dense ").split(" -> ")))


def case(line, batch=2, most=None):
    """Returns the convolution of a line.

    Args:
        line: The line.
        batch: Images.
        most: Makes the image smaller: about this many pixels wide and high, so many that strides
            and padding fall on it as on the whole image.
    """
    kind, *numbers, padding, groups, filters = LAYER.fullmatch(line).groups()
    height, width, channels, kernel_height, kernel_width, stride = map(int, numbers)
    image = [height, width]
    if most is not None:
        # A kernel's width, and then a multiple of the stride less than in the whole image.
        least = max(most, kernel_height + stride, kernel_width + stride)
        image = [n if n <= least else least + (n - least) % (2 * stride) for n in image]
    return Case(
        image=tuple(image),
        kernel=(kernel_height, kernel_width),
        channels=channels,
        filters=int(filters or 1),
        strides=(stride, stride),
        padding=padding,
        groups=int(groups or 1),
        depthwise=kind == "depthwise",
        batch=batch,
    )


NETWORKS = {
}
