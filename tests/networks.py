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
    r"(conv|depthwise) (\d+)x(\d+)x(\d+) (\d+)x(\d+)/(\d+) (same|valid)"
    r"(?: groups (\d+))?(?: -> (\d+))?"
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
    "ResNet-50": """
conv 230x230x3 7x7/2 valid -> 64
conv 56x56x64 1x1/1 valid -> 64
conv 56x56x64 3x3/1 same -> 64
conv 56x56x64 1x1/1 valid -> 256
conv 56x56x256 1x1/1 valid -> 64
conv 56x56x256 1x1/2 valid -> 128
conv 28x28x128 3x3/1 same -> 128
conv 56x56x256 1x1/2 valid -> 512
conv 28x28x128 1x1/1 valid -> 512
conv 28x28x512 1x1/1 valid -> 128
conv 28x28x512 1x1/2 valid -> 256
conv 14x14x256 3x3/1 same -> 256
conv 28x28x512 1x1/2 valid -> 1024
conv 14x14x256 1x1/1 valid -> 1024
conv 14x14x1024 1x1/1 valid -> 256
conv 14x14x1024 1x1/2 valid -> 512
conv 7x7x512 3x3/1 same -> 512
conv 14x14x1024 1x1/2 valid -> 2048
conv 7x7x512 1x1/1 valid -> 2048
conv 7x7x2048 1x1/1 valid -> 512
dense 2048 -> 1000
""".strip(),
    "VGG-16": """
conv 224x224x3 3x3/1 same -> 64
conv 224x224x64 3x3/1 same -> 64
conv 112x112x64 3x3/1 same -> 128
conv 112x112x128 3x3/1 same -> 128
conv 56x56x128 3x3/1 same -> 256
conv 56x56x256 3x3/1 same -> 256
conv 28x28x256 3x3/1 same -> 512
conv 28x28x512 3x3/1 same -> 512
conv 14x14x512 3x3/1 same -> 512
dense 25088 -> 4096
dense 4096 -> 4096
dense 4096 -> 1000
""".strip(),
    "MobileNetV2": """
conv 224x224x3 3x3/2 same -> 32
depthwise 112x112x32 3x3/1 same
conv 112x112x32 1x1/1 same -> 16
conv 112x112x16 1x1/1 same -> 96
depthwise 113x113x96 3x3/2 valid
conv 56x56x96 1x1/1 same -> 24
conv 56x56x24 1x1/1 same -> 144
depthwise 56x56x144 3x3/1 same
conv 56x56x144 1x1/1 same -> 24
depthwise 57x57x144 3x3/2 valid
conv 28x28x144 1x1/1 same -> 32
conv 28x28x32 1x1/1 same -> 192
depthwise 28x28x192 3x3/1 same
conv 28x28x192 1x1/1 same -> 32
depthwise 29x29x192 3x3/2 valid
conv 14x14x192 1x1/1 same -> 64
conv 14x14x64 1x1/1 same -> 384
depthwise 14x14x384 3x3/1 same
conv 14x14x384 1x1/1 same -> 64
conv 14x14x384 1x1/1 same -> 96
conv 14x14x96 1x1/1 same -> 576
depthwise 14x14x576 3x3/1 same
conv 14x14x576 1x1/1 same -> 96
depthwise 15x15x576 3x3/2 valid
conv 7x7x576 1x1/1 same -> 160
conv 7x7x160 1x1/1 same -> 960
depthwise 7x7x960 3x3/1 same
conv 7x7x960 1x1/1 same -> 160
conv 7x7x960 1x1/1 same -> 320
conv 7x7x320 1x1/1 valid -> 1280
dense 1280 -> 1000
""".strip(),
    "GoogLeNet-v1": """
conv 224x224x3 7x7/2 same -> 64
conv 56x56x64 1x1/1 same -> 64
conv 56x56x64 3x3/1 same -> 192
conv 28x28x192 1x1/1 same -> 96
conv 28x28x192 1x1/1 same -> 16
conv 28x28x192 1x1/1 same -> 64
conv 28x28x96 3x3/1 same -> 128
conv 28x28x16 5x5/1 same -> 32
conv 28x28x192 1x1/1 same -> 32
conv 28x28x256 1x1/1 same -> 128
conv 28x28x256 1x1/1 same -> 32
conv 28x28x128 3x3/1 same -> 192
conv 28x28x32 5x5/1 same -> 96
conv 28x28x256 1x1/1 same -> 64
conv 14x14x480 1x1/1 same -> 96
conv 14x14x480 1x1/1 same -> 16
conv 14x14x480 1x1/1 same -> 192
conv 14x14x96 3x3/1 same -> 208
conv 14x14x16 5x5/1 same -> 48
conv 14x14x480 1x1/1 same -> 64
conv 14x14x512 1x1/1 same -> 112
conv 14x14x512 1x1/1 same -> 24
conv 14x14x512 1x1/1 same -> 160
conv 14x14x112 3x3/1 same -> 224
conv 14x14x24 5x5/1 same -> 64
conv 14x14x512 1x1/1 same -> 64
conv 14x14x512 1x1/1 same -> 128
conv 14x14x128 3x3/1 same -> 256
conv 14x14x512 1x1/1 same -> 144
conv 14x14x512 1x1/1 same -> 32
conv 14x14x144 3x3/1 same -> 288
conv 14x14x32 5x5/1 same -> 64
conv 14x14x528 1x1/1 same -> 160
conv 14x14x528 1x1/1 same -> 32
conv 14x14x528 1x1/1 same -> 256
conv 14x14x160 3x3/1 same -> 320
conv 14x14x32 5x5/1 same -> 128
conv 14x14x528 1x1/1 same -> 128
conv 7x7x832 1x1/1 same -> 160
conv 7x7x832 1x1/1 same -> 32
conv 7x7x832 1x1/1 same -> 256
conv 7x7x160 3x3/1 same -> 320
conv 7x7x32 5x5/1 same -> 128
conv 7x7x832 1x1/1 same -> 128
conv 7x7x832 1x1/1 same -> 192
conv 7x7x832 1x1/1 same -> 48
conv 7x7x832 1x1/1 same -> 384
conv 7x7x192 3x3/1 same -> 384
conv 7x7x48 5x5/1 same -> 128
conv 4x4x512 1x1/1 same -> 128
conv 4x4x528 1x1/1 same -> 128
dense 2048 -> 1024
dense 1024 -> 1000
""".strip(),
    "AlexNet": """
conv 227x227x3 11x11/4 valid -> 96
conv 27x27x96 5x5/1 same groups 2 -> 256
conv 13x13x256 3x3/1 same -> 384
conv 13x13x384 3x3/1 same groups 2 -> 384
conv 13x13x384 3x3/1 same groups 2 -> 256
dense 9216 -> 4096
dense 4096 -> 4096
dense 4096 -> 1000
""".strip(),
}
