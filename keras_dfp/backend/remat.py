"""Rematerialisation: the recomputation runs under the policy of the first computation."""

import contextlib
import functools

from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import core

from keras_dfp.backend.registry import replaces

_SCOPES = "name_scope_stack"


@replaces(core, "remat", "f")
def _remat(original):
    @functools.wraps(original)
    def remat(f):
        @functools.wraps(f)
        def rematerialised(*args, **kwargs):
            # TensorFlow calls the function again in the backward pass, where no layer is being
            # called any more; Keras's stack of layers is what tells the layer, and its policy.
            scopes = list(global_state.get_global_attribute(_SCOPES) or ())

            @functools.wraps(f)
            def in_layer(*args, **kwargs):
                with _name_scopes(scopes):
                    return f(*args, **kwargs)

            return original(in_layer)(*args, **kwargs)

        return rematerialised

    return remat


@contextlib.contextmanager
def _name_scopes(scopes):
    outer = global_state.get_global_attribute(_SCOPES)
    global_state.set_global_attribute(_SCOPES, list(scopes))
    try:
        yield
    finally:
        global_state.set_global_attribute(_SCOPES, outer)
