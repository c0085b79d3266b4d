"""The networks of the zoo: one folder each, installed as `keras_dfp.model_zoo`.

    <network>/architecture.py   build(input_shape, classes, ...) -> keras.Model, of plain Keras layers
    <network>/recipe.toml       how to train it: what `keras_dfp/recipe.py` reads and explains

Users come in through `keras_dfp.zoo`. To add a network, add a folder; `zoo.list()` finds it.
"""
