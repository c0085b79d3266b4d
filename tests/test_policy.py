"""DFPPolicy: names, options, patterns, saving; and the policy of a whole model."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import dtype_policies, layers, ops
from keras.src.backend.common import global_state

import keras_dfp
from keras_dfp import DFPFormat, DFPPolicy, policy_scope
from keras_dfp.model_policy import layers_in_order

EVERY_OPTION = {
    "mantissa_bits": 12,
    "rounding": "stochastic",
    "accumulation": "spill",
    "products": ["forward", "weight_gradient"],
    "exponents": "tensor",
    "scope": "all",
    "exclude": ["stem*", "head"],
    "overrides": {
        "block/*": {"mantissa_bits": 16},
        "norm": {"scope": "weights"},
        "gate": "float32",
        "mix": "dfp16",
    },
}


def small_cnn(name=None, **kwargs):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="stem", **kwargs),
            layers.Conv2D(4, 3, name="body", **kwargs),
            layers.Flatten(),
            layers.Dense(5, name="hidden", **kwargs),
            layers.Dense(2, name="head", **kwargs),
        ],
        name=name,
    )


def images(n=4):
    return np.random.default_rng(0).standard_normal((n, 8, 8, 3)).astype("float32")


def formats(model):
    """What the layers that multiply run on, by name."""
    rows = keras_dfp.describe(model).rows
    return {row["path"].split("/")[-1]: row["format"] for row in rows}


def integer_layers(model):
    return [name for name, fmt in formats(model).items() if fmt is not None]


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["dfp16", "dfp16_paper"])
def test_names_work_wherever_keras_takes_a_policy(name):
    expected = DFPPolicy(name)
    assert dtype_policies.get(name) == expected
    assert keras.DTypePolicy(name) == expected
    assert layers.Dense(1, dtype=name).dtype_policy == expected
    keras.config.set_dtype_policy(name)
    assert keras.config.dtype_policy() == expected
    assert layers.Dense(1).dtype_policy == expected


def test_other_names_are_keras_own():
    assert repr(keras.DTypePolicy("mixed_bfloat16")) == '<DTypePolicy "mixed_bfloat16">'
    with pytest.raises(ValueError, match="dfp17"):
        keras.DTypePolicy("dfp17")


def test_set_policy_and_policy_scope():
    keras_dfp.set_policy(DFPPolicy(mantissa_bits=12))
    assert layers.Dense(1).dtype_policy.format.mantissa_bits == 12
    with keras_dfp.policy_scope("dfp16_paper"):
        assert layers.Dense(1).dtype_policy.name == "dfp16_paper"
    assert layers.Dense(1).dtype_policy.format.mantissa_bits == 12
    with pytest.raises(KeyError), keras_dfp.policy_scope("float32"):
        raise KeyError
    assert layers.Dense(1).dtype_policy.format.mantissa_bits == 12
    keras_dfp.set_policy("float32")
    assert layers.Dense(1).dtype_policy == keras.DTypePolicy("float32")


CLEAR_SESSION = {
    "keras.utils": keras.utils.clear_session,
    "keras.backend": keras.backend.clear_session,
    "tf.keras": tf.keras.backend.clear_session,
}


@pytest.mark.parametrize("clear_session", CLEAR_SESSION.values(), ids=CLEAR_SESSION)
def test_clear_session_drops_the_global_policy_and_says_so(clear_session):
    for _ in range(2):
        keras_dfp.set_policy(DFPPolicy(mantissa_bits=12))
        with pytest.warns(
            UserWarning, match=r"^keras_dfp: .*mantissa_bits=12.*set_policy"
        ) as caught:
            clear_session()
        assert len(caught) == 1 and caught[0].filename == __file__
        assert keras.config.dtype_policy() == keras.DTypePolicy("float32")


@pytest.mark.parametrize("policy", [None, "float32", "mixed_bfloat16"])
def test_clear_session_is_as_ever_under_other_policies(policy):
    if policy is not None:
        keras.config.set_dtype_policy(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.utils.clear_session()
        keras.utils.clear_session(free_memory=False)
    assert global_state.get_global_attribute("dtype_policy") is None
    assert layers.Dense(1).name == "dense"


def test_clear_session_says_nothing_of_layers_that_keep_their_policy():
    layer = layers.Dense(1, dtype="dfp16")
    with keras_dfp.policy_scope("dfp16"):
        layers.Dense(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.utils.clear_session()
    assert layer.dtype_policy.name == "dfp16"


def test_variables_and_activations_are_float32():
    policy = DFPPolicy()
    assert (policy.variable_dtype, policy.compute_dtype) == ("float32", "float32")
    layer = layers.Dense(2, dtype=policy)
    assert layer(np.ones((1, 3))).dtype == "float32"
    assert layer.kernel.dtype == "float32"


# ----------------------------------------------------------------------------------- options


def test_defaults():
    assert DFPPolicy().format == DFPFormat(14, "nearest", "exact")
    assert DFPPolicy().format.exponents == "sample"
    paper = DFPFormat(14, "nearest", "spill", exponents="tensor")
    assert DFPPolicy("dfp16_paper").format == paper
    # The recipe of a paper has no choice.
    assert DFPPolicy("dfp16_paper", accumulation="exact", exponents="sample").format == paper


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dfp8"}, "'dfp16' or 'dfp16_paper'; got 'dfp8'"),
        ({"mantissa_bits": 17}, "from 8 to 16; got 17"),
        ({"mantissa_bits": 12.0}, "from 8 to 16; got 12.0"),
        ({"rounding": "up"}, "'nearest', 'truncate', 'stochastic'; got 'up'"),
        ({"accumulation": "fast"}, "'exact', 'spill'; got 'fast'"),
        ({"exponents": "row"}, "exponents must be one of 'sample', 'tensor'; got 'row'"),
        ({"exponents": None}, "'sample', 'tensor'; got None"),
        ({"overrides": {"head": {"exponents": "batch"}}}, "'sample', 'tensor'; got 'batch'"),
        ({"products": "forward"}, "got the string 'forward'"),
        ({"products": ["backward"]}, "'input_gradient', 'weight_gradient'; got 'backward'"),
        ({"products": []}, "at least one"),
        ({"scope": "attention"}, "scope must be 'weights' or 'all'; got 'attention'"),
        ({"overrides": {"head": {"scope": 1}}}, "scope must be 'weights' or 'all'; got 1"),
        ({"exclude": "head"}, "list of patterns; got the string 'head'"),
        ({"exclude": [3]}, "non-empty strings; got 3"),
        ({"overrides": {"head": {"bits": 12}}}, r"overrides\['head'\] may change mantissa_bits"),
        ({"overrides": {"head": {"mantissa_bits": 7}}}, "from 8 to 16; got 7"),
        ({"overrides": {"head": "mixed_bfloat16"}}, "must be a dict of options, 'float32'"),
        ({"overrides": {"head": DFPPolicy(exclude=["a"])}}, "without exclude and overrides"),
    ],
)
def test_bad_options_raise_and_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        DFPPolicy(**arguments)


def test_serialisation_keeps_every_option():
    policy = DFPPolicy(**EVERY_OPTION)
    config = json.loads(json.dumps(dtype_policies.serialize(policy)))
    restored = dtype_policies.deserialize(config)
    assert type(restored) is DFPPolicy
    assert restored == policy
    assert restored.get_config() == policy.get_config()
    assert layers.Dense.from_config(layers.Dense(1, dtype=policy).get_config()).dtype_policy == (
        policy
    )


def test_a_config_from_before_there_was_a_scope():
    policy = DFPPolicy(exclude=["head"], overrides={"gate": {"mantissa_bits": 16}})
    config = policy.get_config()
    del config["scope"], config["overrides"]["gate"]["scope"]
    assert DFPPolicy.from_config(config) == policy
    assert policy.scope == "weights" and "scope='weights'" not in repr(DFPPolicy(exclude=["a"]))
    assert DFPPolicy(scope="weights") == DFPPolicy()


@pytest.mark.parametrize("name", ["dfp16", "dfp16_paper"])
def test_configs_from_before_an_option_get_its_default(name):
    policy = DFPPolicy(name, overrides={"head": {"mantissa_bits": 16}})
    config = policy.get_config()
    for options in (config, config["overrides"]["head"]):
        assert options.pop("exponents") == ("sample" if name == "dfp16" else "tensor")
    assert DFPPolicy.from_config(config) == policy


@pytest.mark.parametrize("option", EVERY_OPTION)
def test_equality_sees_every_option(option):
    policy = DFPPolicy(**{option: EVERY_OPTION[option]})
    assert policy != DFPPolicy()
    assert policy == DFPPolicy(**{option: EVERY_OPTION[option]})
    assert hash(policy) == hash(DFPPolicy(**{option: EVERY_OPTION[option]}))
    assert option in repr(policy)


def test_repr_shows_what_was_chosen():
    assert repr(DFPPolicy()) == "DFPPolicy('dfp16')"
    assert repr(DFPPolicy(exponents="tensor")) == "DFPPolicy('dfp16', exponents='tensor')"
    assert repr(DFPPolicy("dfp16_paper")) == "DFPPolicy('dfp16_paper')"


def test_equality_with_other_policies():
    assert DFPPolicy() != DFPPolicy("dfp16_paper", accumulation="spill")
    assert DFPPolicy() != keras.DTypePolicy("float32")
    assert keras.DTypePolicy("float32") != DFPPolicy()


def test_a_policy_is_true_although_it_is_a_mapping():
    assert (DFPPolicy() or "float32") == DFPPolicy()


# ---------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("head", ["head"]),
        ("h*", ["head", "hidden"]),
        ("cnn/body", ["body"]),
        ("cnn/*", ["stem", "body", "hidden", "head"]),
        ("[sb]*", ["stem", "body"]),
        ("ead", []),
    ],
)
@pytest.mark.filterwarnings("ignore:keras_dfp")
def test_exclude(pattern, excluded):
    model = small_cnn("cnn", dtype=DFPPolicy(exclude=[pattern]))
    expected = [name for name in ("stem", "body", "hidden", "head") if name not in excluded]
    assert integer_layers(model) == expected


def test_overrides():
    policy = DFPPolicy(
        rounding="truncate",
        exclude=["h*"],
        overrides={"head": {"mantissa_bits": 16}, "stem": "float32", "body": "dfp16"},
    )
    assert formats(small_cnn(dtype=policy)) == {
        "stem": None,
        "body": DFPFormat(),
        "hidden": None,
        "head": DFPFormat(16, "truncate"),
    }


@pytest.mark.filterwarnings("ignore:keras_dfp")
def test_an_override_changes_the_exponents_of_one_layer():
    policy = DFPPolicy(overrides={"body": {"exponents": "tensor"}})
    model = small_cnn(dtype=policy)
    assert {name: fmt.exponents for name, fmt in formats(model).items()} == {
        "stem": "sample",
        "body": "tensor",
        "hidden": "sample",
        "head": "sample",
    }
    # A bright image beside the others takes their details from `body` alone.
    x = images()
    bright = np.concatenate([x, 1e4 * x[:1]])
    stem, body = (keras.Model(model.inputs[0], model.get_layer(n).output) for n in ("stem", "body"))
    np.testing.assert_array_equal(stem(bright)[:4], stem(x))
    assert not np.array_equal(body(bright)[:4], body(x))


def test_patterns_that_match_nothing_are_reported():
    model = small_cnn(dtype=DFPPolicy(exclude=["stem", "fc"], overrides={"fc2": "float32"}))
    message = "matches 'fc', 'fc2'"
    with pytest.warns(UserWarning, match=message):
        model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=message):
        keras_dfp.describe(model)
    with pytest.warns(UserWarning, match="matches 'nowhere'"):
        keras_dfp.set_model_policy(model, DFPPolicy(exclude=["nowhere"]))


def test_patterns_of_an_unbuilt_model_are_checked_once_it_is_built():
    class Late(keras.Model):
        def build(self, input_shape):
            self.head = layers.Dense(1, name="head")

        def call(self, x):
            return self.head(x)

    keras_dfp.set_policy(DFPPolicy(exclude=["head", "fc"]))
    model = Late()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compile("sgd", "mse")
    x = np.ones((4, 3), "float32")
    with pytest.warns(UserWarning, match="matches 'fc'") as caught:
        model.fit(x, x[:, :1], epochs=2, verbose=0)
        model.evaluate(x, x[:, :1], verbose=0)
    assert len([w for w in caught if "matches 'fc'" in str(w.message)]) == 1


# ------------------------------------------------------------------------- one layer's policy


def test_assigning_a_layers_policy_touches_no_other_layer():
    shared = DFPPolicy()
    first, second = small_cnn(dtype=shared), small_cnn(dtype=shared)
    first.get_layer("body").dtype_policy = "float32"
    assert integer_layers(first) == ["stem", "hidden", "head"]
    assert len(integer_layers(second)) == 4
    assert len(shared) == 0


def test_a_policy_is_immutable():
    with pytest.raises(TypeError, match="immutable"):
        DFPPolicy()["head"] = "float32"


def test_a_dfp_policy_inside_keras_own_policy_map():
    policies = dtype_policies.DTypePolicyMap(default_policy=keras.DTypePolicy("float32"))
    policies["cnn/b.*"] = DFPPolicy()
    assert integer_layers(small_cnn("cnn", dtype=policies)) == ["body"]


# ----------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dfp17", "Did you mean 'dfp16'? Those of keras_dfp are 'dfp16' and 'dfp16_paper'."),
        ("dpf16", "Did you mean 'dfp16'?"),
        ("DFP16-Paper", "Did you mean 'dfp16_paper'?"),
        ("mixed_dfp", "Those of keras_dfp are 'dfp16' and 'dfp16_paper'."),
        ("int8_from_dfp17", "Did you mean 'dfp16'?"),
        ("dfp16:fused=false", "give them to keras_dfp.DFPPolicy('dfp16', mantissa_bits=12)."),
        ("float17", ""),
        ("bf16", ""),
    ],
)
def test_a_name_that_is_nearly_ours_says_what_is_right(name, hint):
    with pytest.raises(ValueError) as stock:
        keras.DTypePolicy("float17")
    expected = str(stock.value).replace("float17", name.removeprefix("int8_from_"))
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    for use in (
        keras.config.set_dtype_policy,
        lambda name: layers.Dense(1, dtype=name),
        lambda name: keras_dfp.set_model_policy(model, name),
        lambda name: keras_dfp.zoo.load("lenet", policy=name),
        lambda name: DFPPolicy(overrides={"head": name}),
    ):
        with pytest.raises(ValueError) as error:
            use(name)
        assert str(error.value).startswith(expected)
        assert (hint in str(error.value)) if hint else (str(error.value) == expected)


def save_and_load(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


def test_a_saved_model_keeps_its_policy_under_any_global_policy(tmp_path):
    model = small_cnn(dtype=DFPPolicy(mantissa_bits=9, exclude=["head"]))
    restored = save_and_load(model, tmp_path)
    assert formats(restored) == formats(model)
    np.testing.assert_array_equal(
        restored.predict(images(), verbose=0), model.predict(images(), verbose=0)
    )


def composite():
    inputs = keras.Input((5, 4))
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.RNN([layers.LSTMCell(3), layers.GRUCell(4)], return_sequences=True)(x)
    x = layers.TimeDistributed(layers.Dense(3))(x)
    x = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1)))
    return keras.Model(inputs, keras.Sequential([layers.Dense(2)])(x))


def test_composite_models_keep_their_policy(tmp_path):
    with keras_dfp.policy_scope(DFPPolicy(scope="all")):
        model = composite()
    rows = keras_dfp.describe(model).rows
    assert all(row["format"] for row in rows) and len(rows) == 12
    restored = save_and_load(model, tmp_path)
    assert all(row["format"] for row in keras_dfp.describe(restored).rows)
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype("float32")
    np.testing.assert_array_equal(restored(x), model(x))


def test_a_float32_model_loaded_under_a_dfp_global_policy_stays_float32(tmp_path):
    model = composite()
    keras_dfp.set_policy("dfp16")
    restored = save_and_load(model, tmp_path)
    assert not any(row["format"] for row in keras_dfp.describe(restored).rows)
    restored.compile("sgd", "mse", jit_compile=True)
    assert restored.jit_compile


@pytest.mark.slow
def test_loading_without_the_package_says_which_one_is_missing(tmp_path):
    small_cnn(dtype="dfp16").save(tmp_path / "model.keras")
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "keras_dfp":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import keras
try:
    keras.models.load_model({str(tmp_path / "model.keras")!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("TypeError")
    assert "keras_dfp.DFPPolicy" in run.stdout


# ---------------------------------------------------------------------------- whole models


def test_set_model_policy_there_and_back_keeps_weights_and_optimizer():
    keras.utils.set_random_seed(0)
    model = small_cnn()
    x, y = images(), np.ones((4, 2), "float32")
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    model.fit(x, y, verbose=0)
    optimizer = model.optimizer
    state = [v.numpy() for v in (*model.variables, *optimizer.variables)]
    float32 = model.predict(x, verbose=0)

    keras_dfp.set_model_policy(model, DFPPolicy(mantissa_bits=8))
    assert len(integer_layers(model)) == 4
    assert model.optimizer is optimizer
    for before, after in zip(state, (*model.variables, *optimizer.variables), strict=True):
        np.testing.assert_array_equal(before, after.numpy())
    integers = model.predict(x, verbose=0)
    assert not np.array_equal(integers, float32)
    np.testing.assert_allclose(integers, float32, atol=0.1)
    model.fit(x, y, verbose=0)

    for variable, value in zip((*model.variables, *optimizer.variables), state, strict=True):
        variable.assign(value)
    keras_dfp.set_model_policy(model, "float32")
    np.testing.assert_array_equal(model.predict(x, verbose=0), float32)


def test_set_model_policy_reaches_layers_inside_layers():
    model = composite()
    keras_dfp.set_model_policy(model, DFPPolicy(scope="all"))
    assert all(row["format"] for row in keras_dfp.describe(model).rows)
    keras_dfp.set_model_policy(model, "float32")
    assert not any(row["format"] for row in keras_dfp.describe(model).rows)


def test_set_model_policy_leaves_other_dtypes_alone():
    inputs = keras.Input((3,), dtype="int64")
    x = layers.Hashing(8, dtype="int64")(inputs)
    x = layers.Dense(2)(layers.Flatten()(layers.Embedding(8, 4)(x)))
    model = keras.Model(inputs, layers.Dense(2, dtype="float64")(x))
    keras_dfp.set_model_policy(model, "dfp16")
    dtypes = [layer.dtype for layer in model.layers[1:]]
    assert dtypes == ["int64", "float32", "float32", "float32", "float64"]
    assert integer_layers(model) == [model.layers[-2].name]


def test_set_model_policy_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="must be a DFPPolicy or 'float32'; got None"):
        keras_dfp.set_model_policy(small_cnn(), None)
    with pytest.raises(ValueError, match="must be a DFPPolicy or 'float32'; got <DTypePolicy"):
        keras_dfp.set_model_policy(small_cnn(), "mixed_bfloat16")
    with keras_dfp.policy_scope("float64"):
        model = small_cnn()
    with pytest.raises(ValueError, match="no layer of model .* has float32 variables"):
        keras_dfp.set_model_policy(model, "dfp16")


# ------------------------------------------------------------------------------ dfp16_paper


def test_paper_recipe_by_set_model_policy():
    model = small_cnn()
    keras_dfp.set_model_policy(model, "dfp16_paper")
    assert integer_layers(model) == ["body", "hidden"]
    assert formats(model)["body"].accumulation == "spill"
    keras_dfp.set_model_policy(model, "dfp16")
    assert len(integer_layers(model)) == 4


def test_paper_recipe_at_compile_and_after_loading(tmp_path):
    model = small_cnn(dtype="dfp16_paper")
    assert len(integer_layers(model)) == 4
    model.compile("sgd", "mse")
    assert integer_layers(model) == ["body", "hidden"]
    model.compile("sgd", "mse")
    assert model.get_layer("stem").dtype_policy.exclude == ("stem",)
    assert integer_layers(save_and_load(model, tmp_path)) == ["body", "hidden"]


def test_paper_recipe_of_a_model_built_after_compile():
    with keras_dfp.policy_scope("dfp16_paper"):
        model = keras.Sequential([layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(1)])
        model.compile("sgd", "mse")
        model.fit(images(), np.ones((4, 1)), verbose=0)
    assert integer_layers(model) == []


def test_paper_recipe_yields_to_overrides():
    model = small_cnn(dtype=DFPPolicy("dfp16_paper", overrides={"stem": {"mantissa_bits": 16}}))
    model.compile("sgd", "mse")
    assert integer_layers(model) == ["stem", "body", "hidden"]


def test_layers_in_order_goes_depth_first():
    inner = keras.Sequential([layers.Dense(1, name="b"), layers.Dense(1, name="c")], name="inner")
    model = keras.Sequential([layers.Dense(1, name="a"), inner, layers.Dense(1, name="d")])
    assert [layer.name for layer in layers_in_order(model)][1:] == ["a", "inner", "b", "c", "d"]


# ---- what Keras does to policies in place --------------------------------------------------------


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_keras_quantizes_a_model_as_the_float32_one_it_is(mode, tmp_path):
    x = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    results = []
    for policy in ("dfp16", "float32"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu", dtype=policy)])
        model.add(layers.EinsumDense("ab,bc->ac", 3, dtype=policy))
        model.quantize(mode)
        model.save(tmp_path / "model.keras")
        results.append(keras.models.load_model(tmp_path / "model.keras")(x))
        assert model.layers[0].dtype_policy.name == f"{mode}_from_float32"
    np.testing.assert_array_equal(*results)
    with pytest.raises(ValueError, match="is quantized"):
        model.layers[0].dtype_policy = "dfp16"


def test_a_policy_that_keras_refuses_leaves_the_layer_as_it_was():
    layer = layers.Conv1D(4, 3, dtype="dfp16")
    layer.build((None, 8, 6))
    with pytest.raises(NotImplementedError, match="quantize"):
        layer.dtype_policy = "int8_from_dfp16"
    assert layer.dtype_policy == DFPPolicy()


def test_saving_a_map_leaves_its_policies_as_they_were():
    policies = keras.dtype_policies.DTypePolicyMap(policy_map={"dense": DFPPolicy("dfp16_paper")})
    policies.get_config()
    assert policies["dense"].get_config() == DFPPolicy("dfp16_paper").get_config()


def test_clones_and_parts_of_a_model_keep_the_policy_of_its_operations():
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    with policy_scope(DFPPolicy(scope="all")):
        a = keras.Input((6,))
        h = layers.Dense(6)(a)
        model = keras.Model(a, ops.matmul(h, ops.transpose(h)))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (clone, keras.Model(a, model.output)):
        np.testing.assert_array_equal(other(x), model(x))
    assert keras.Model(a, ops.matmul(h, ops.relu(ops.transpose(h)))).dtype_policy.name == "float32"


@keras.saving.register_keras_serializable("test_policy")
class BuildsSublayers(layers.Layer):
    def build(self, shape):
        self.inner = layers.Dense(4)
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


def test_layers_made_in_build_come_back_as_they_were(tmp_path):
    for outer, inner in (("dfp16", "dfp16"), ("dfp16", "float32"), ("float32", "dfp16")):
        layer = BuildsSublayers(dtype=outer)
        with policy_scope(inner):
            model = keras.Sequential([keras.Input((8,)), layer])
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.layers[0].inner.dtype_policy.name == inner


@keras.saving.register_keras_serializable("test_policy")
class WithoutConfig(layers.Layer):
    def __init__(self, units=2, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units))

    def call(self, x):
        return x @ self.kernel


@pytest.mark.parametrize("policy", ["dfp16", DFPPolicy(mantissa_bits=10)], ids=str)
def test_layers_without_get_config_are_saved_again_and_again(policy, tmp_path):
    model = keras.Sequential([keras.Input((3,)), WithoutConfig(4, dtype=policy)])
    for again in (save_and_load, lambda model, _: keras.models.clone_model(model), save_and_load):
        model = again(model, tmp_path)
        assert model.layers[0].units == 4
        assert model.layers[0].dtype_policy == keras.dtype_policies.get(policy)


@keras.saving.register_keras_serializable("test_policy")
class TellsNoDtypes(keras.Model):
    def __init__(self, units=3):
        super().__init__()
        self.stem = layers.Dense(units)
        self.blocks = [layers.Dense(units), BuildsSublayers()]
        self.head = layers.Dense(2, dtype="float32")

    def call(self, x):
        for layer in (self.stem, *self.blocks, self.head):
            x = layer(x)
        return x

    def get_config(self):
        return {"units": 3}


def policies(model):
    return [layer.dtype_policy for layer in layers_in_order(model)]


WAYS = {
    "file": save_and_load,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "json": lambda model, _: keras.models.model_from_json(model.to_json()),
    "clone": lambda model, _: keras.models.clone_model(model),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("later", ["float16", pytest.param("dfp16_paper", marks=pytest.mark.slow)])
def test_policies_that_no_config_tells_come_back_as_saved(way, later, tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
    with policy_scope(DFPPolicy(mantissa_bits=12)):
        model = TellsNoDtypes()
        model.compile("sgd", "mse")
        model.fit(x, x[:, :2], verbose=0)
    model.blocks[0].dtype_policy = "dfp16"
    with policy_scope(later), warnings.catch_warnings():
        warnings.filterwarnings("error", "keras_dfp")
        other = WAYS[way](model, tmp_path)
    assert policies(other) == policies(model)
    if way in ("file", "deepcopy"):
        np.testing.assert_array_equal(other(x), model(x))
        other.fit(x, x[:, :2], verbose=0)


@pytest.mark.parametrize("then, later", [("dfp16", "float32"), ("float32", "dfp16")])
def test_clones_keep_the_policies_of_layers_in_layers(then, later):
    with policy_scope(then):
        inputs = keras.Input((8,))
        model = keras.Model(inputs, keras.ops.relu(BuildsSublayers()(inputs)))
        sequence = keras.Sequential([keras.Input((8,)), BuildsSublayers()])
    with policy_scope(later):
        for each in (model, sequence):
            (block,) = (
                layer
                for layer in keras.models.clone_model(each).layers
                if isinstance(layer, BuildsSublayers)
            )
            assert [policy.name for policy in policies(block)] == [then, then]

        def changed(layer):
            return type(layer).from_config({**layer.get_config(), "dtype": later})

        clone = keras.models.clone_model(sequence, clone_function=changed)
        assert clone.layers[0].inner.dtype_policy.name == later


@pytest.mark.slow
def test_a_process_that_unpickles_a_model_needs_no_import(tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype("float32")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).layers[0].dtype_policy)"
    for policy in ("dfp16", "float32"):
        model = small_cnn(dtype=policy)
        pickled = pickle.dumps(model)
        assert (b"keras_dfp" in pickled) == (policy == "dfp16")
        np.testing.assert_array_equal(pickle.loads(pickled)(x), model(x))
        if policy == "dfp16":
            told = subprocess.run(
                [sys.executable, "-c", code], input=pickled, stdout=subprocess.PIPE
            )
            assert told.stdout.decode().strip() == "DFPPolicy('dfp16')"


def test_a_float32_file_comes_back_float32(tmp_path):
    model = TellsNoDtypes()
    model(np.ones((1, 8)))
    assert "keras_dfp" not in model.to_json()
    for later in ("float32", "dfp16"):
        with policy_scope(later):
            loaded = save_and_load(model, tmp_path)
        assert {policy.name for policy in policies(loaded)} == {"float32"}


def test_a_policy_whose_layer_is_gone_is_told_once(tmp_path, monkeypatch):
    with policy_scope("dfp16"):
        model = TellsNoDtypes()
    config = json.loads(model.to_json())
    monkeypatch.setattr(TellsNoDtypes, "__init__", lambda self, units: keras.Model.__init__(self))
    with pytest.warns(UserWarning, match=rf"not all have .*: {model.stem.name} \(dfp16\)") as told:
        keras.models.model_from_json(json.dumps(config))
    assert len(told) == 1
