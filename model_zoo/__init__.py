"""The networks of the zoo: one folder each, installed as `keras_dfp.model_zoo`.

    <network>/architecture.py   `build(input_shape, classes, ...)`: a model of plain Keras layers
    <network>/recipe.toml       how to train it; `keras_dfp/recipe.py` explains the keys

Users come in through `keras_dfp.zoo`. To add a network, add a folder; `zoo.list()` finds it.
"""
