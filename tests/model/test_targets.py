import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.model.targets import all_targets, finals_of, find_targets


def names(targets):
    return [t.name for t in targets]


@pytest.fixture
def nested():
    """outer( inner( a, deep( b ) ), c ), all Sequential."""
    deep = keras.Sequential([layers.Dense(2, name="b")], name="deep")
    inner = keras.Sequential([layers.Dense(3, name="a"), deep], name="inner")
    return keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="c")], name="outer")


class Twins(keras.Model):
    """Two layers of one name, so that two kernels have the same path."""

    def __init__(self):
        super().__init__(name="twins")
        self.parts = [layers.Dense(3, name="d"), layers.Dense(3, name="d")]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.fixture
def twins():
    model = Twins()
    model(np.zeros((1, 3), "float32"))
    return model


def test_targets_come_in_the_order_of_the_layers(nested):
    assert [t.layer.name for t in find_targets(nested, "__ALL_PRUNABLE__")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name",
    [
        "outer/inner/deep/b/kernel",
        "inner/deep/b/kernel",
        "deep/b/kernel",
        "b/kernel",
        "outer.inner.deep.b.kernel",
        "b.kernel",
        "inner.deep.b.weight",
        "b.weight",
        "re:b/",
        r"re:.*deep\.b\.weight$",
        "re:outer/inner/deep/b/kernel",
    ],
)
def test_aliases(nested, name):
    (target,) = find_targets(nested, [name], exclude=["b/bias"])
    assert target.layer.name == "b"
    assert target.variable.name == "kernel"
    assert names(find_targets(nested, name, exclude=["b/bias"])) == [target.name], "one name needs no list"


def test_patterns_match_from_the_start(nested):
    with pytest.raises(KeyError, match="'re:ernel' in params matches no variable from the start of its name"):
        find_targets(nested, ["re:ernel"])
    assert names(find_targets(nested, ["re:.*ernel"])) == names(find_targets(nested, "__ALL_PRUNABLE__"))


def test_saved_and_loaded_models_answer_to_the_same_short_names(nested, tmp_path):
    nested.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for name in ("a/kernel", "b.weight", "c/kernel"):
        (before,), (after,) = find_targets(nested, [name]), find_targets(loaded, [name])
        np.testing.assert_array_equal(before.read(), after.read())


def test_duplicate_paths_are_two_variables(twins):
    assert names(find_targets(twins, "__ALL_PRUNABLE__")) == ["twins/d/kernel"] * 2
    targets = find_targets(twins, ["d/kernel"])
    assert [t.variable for t in targets] == [part.kernel for part in twins.parts]
    assert targets[0].variable is not targets[1].variable


def test_a_layer_used_twice_counts_once():
    shared = layers.Dense(4, name="shared")
    x = keras.Input((4,))
    model = keras.Model(x, shared(shared(x)))
    assert [t.layer for t in find_targets(model, "__ALL_PRUNABLE__")] == [shared]


class Tied(keras.Model):
    """Holds its Dense layer's kernel under a name of its own, to use it transposed."""

    def __init__(self):
        super().__init__(name="tied")
        self.dense = layers.Dense(3, name="into", use_bias=False)
        self.dense.build((None, 4))
        self.kernel = self.dense.kernel

    def call(self, x):
        return keras.ops.matmul(self.dense(x), keras.ops.transpose(self.kernel))


def test_a_tied_variable_counts_once_and_is_the_kernel_of_its_layer():
    model = Tied()
    model(np.zeros((1, 4), "float32"))
    (target,) = find_targets(model, "__ALL_PRUNABLE__")
    assert target.layer is model.dense
    for name in ("into/kernel", "tied/kernel", "into.weight"):
        assert find_targets(model, [name])[0].variable is model.dense.kernel


def test_frozen_variables_are_left_with_a_warning(nested):
    nested.layers[0].trainable = False
    with pytest.warns(UserWarning, match=r"Frozen .*left as they are: .*a/kernel, .*b/kernel\. Set `trainable = True`"):
        targets = find_targets(nested, "__ALL_PRUNABLE__")
    assert [t.layer.name for t in targets] == ["c"]


def test_nothing_but_frozen_variables_is_an_error(nested):
    nested.trainable = False
    with (
        pytest.warns(UserWarning, match="Frozen"),
        pytest.raises(ValueError, match=r"Nothing to prune: params='__ALL_PRUNABLE__'.*prunable variables are: outer"),
    ):
        find_targets(nested, "__ALL_PRUNABLE__")


def test_the_excluded_frozen_layer_gives_no_warning(nested):
    nested.layers[0].trainable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_targets(nested, "__ALL_PRUNABLE__", exclude=["re:.*inner/"])) == 1


def test_many_names_are_cut_short():
    model = keras.Sequential([keras.Input((2,)), *(layers.Dense(2, name=f"n{k}") for k in range(12))])
    model.trainable = False
    with (
        pytest.warns(UserWarning, match=r"n9/kernel, \.\.\. \(12 in all\)\. Set"),
        pytest.raises(ValueError, match=r"n9/kernel, \.\.\. \(12 in all\)"),
    ):
        find_targets(model, "__ALL_PRUNABLE__")


def test_lora_is_refused(nested):
    dense = nested.layers[1]
    dense.enable_lora(2)
    for params in ("__ALL_PRUNABLE__", "__ALL__", ["c/kernel"]):
        with pytest.raises(ValueError, match=r"c/.*LoRA.*Merge the LoRA weights first, or put .* `exclude`"):
            find_targets(nested, params)
    assert [t.layer.name for t in find_targets(nested, "__ALL_PRUNABLE__", exclude=["c/kernel"])] == ["a", "b"]


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantised_layers_are_refused(mode):
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(3, 2, name="conv"), layers.Flatten(), layers.Dense(4, name="dense")]
    )
    model.layers[-1].quantize(mode)
    for params in ("__ALL_PRUNABLE__", ["dense/kernel"]):
        with pytest.raises(ValueError, match=rf"dense/kernel.*quantised layer \({mode}\).*Prune .* before quantising"):
            find_targets(model, params)
    assert [t.layer.name for t in find_targets(model, "__ALL_PRUNABLE__", exclude=["dense/kernel"])] == ["conv"]


def test_exclude_by_name_and_pattern(nested):
    assert names(find_targets(nested, "__ALL_PRUNABLE__", exclude=["a.weight", "re:c"])) == [
        "outer/inner/deep/b/kernel"
    ]
    with pytest.raises(KeyError, match=r"exclude names 'b/kernal', which no variable has\. The nearest: .*b/kernel"):
        find_targets(nested, "__ALL_PRUNABLE__", exclude=["b/kernal"])
    with pytest.raises(ValueError, match=r"Nothing to prune: .* with exclude=\['re:\.\*'\]"):
        find_targets(nested, "__ALL_PRUNABLE__", exclude=["re:.*"])


def test_each_name_must_match_and_the_nearest_are_listed(nested):
    with pytest.raises(KeyError, match=r"params names 'a/kernl', which no variable has\. The nearest: a/kernel"):
        find_targets(nested, ["c/kernel", "a/kernl"])
    with pytest.raises(KeyError, match=r"params names 'xyz123'.*outer/inner/a/kernel, outer/inner/deep/b/kernel"):
        find_targets(nested, ["xyz123"])
    for layer in ("deep", "deep/b"):
        with pytest.raises(KeyError, match=rf"params names '{layer}', which is a layer.* outer/inner/deep/b/kernel\."):
            find_targets(nested, [layer])


@pytest.fixture(scope="module")
def all_sorts():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(7, 4, name="embedding")(tokens)
    x = layers.LayerNormalization(axis=[1, 2], name="norm")(x)
    x = layers.MultiHeadAttention(2, 3, kernel_initializer="zeros", name="attention")(x, x)
    x = layers.Conv1D(3, 2, name="conv")(x)
    x = layers.BatchNormalization(name="batch_norm")(x)
    x = layers.LSTM(2, recurrent_initializer="zeros", name="lstm")(x)
    return keras.Model(tokens, layers.Dense(2, name="dense")(x))


def test_all_prunable_are_the_kernels_and_all_is_every_matrix_but_biases(all_sorts):
    model = all_sorts
    prunable = [(t.layer.name, t.variable.name) for t in find_targets(model, "__ALL_PRUNABLE__")]
    assert sorted(prunable) == sorted(
        [(name, "kernel") for name in ("query", "key", "value", "attention_output", "conv", "lstm_cell", "dense")]
        + [("lstm_cell", "recurrent_kernel")]
    )
    everything = [(t.layer.name, t.variable.name) for t in find_targets(model, "__ALL__")]
    assert set(everything) - set(prunable) == {("embedding", "embeddings"), ("norm", "gamma"), ("norm", "beta")}
    assert names(find_targets(model, "__all_prunable__")) == names(find_targets(model, "__ALL_PRUNABLE__"))
    assert names(find_targets(model, "__all__")) == names(find_targets(model, "__ALL__"))


def test_an_embedding_is_taken_when_named(all_sorts):
    assert [t.layer.name for t in find_targets(all_sorts, ["embedding/embeddings"])] == ["embedding"]


class Scale(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], shape[-1]))

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


def test_an_unknown_layer_is_skipped_unless_named():
    model = keras.Sequential([keras.Input((3,)), Scale(name="scale"), layers.Dense(2, name="dense")])
    assert [t.layer.name for t in find_targets(model, "__ALL_PRUNABLE__")] == ["dense"]
    (target,) = find_targets(model, ["scale/kernel"])
    assert target.order == (1, 0), "the last axis counts as the output"


@pytest.mark.parametrize("model", [keras.Sequential([layers.Dense(3)], name="fresh"), Twins()], ids=["seq", "sub"])
def test_a_model_that_is_not_built(model):
    with pytest.raises(ValueError, match=rf"'{model.name}' isn't built.*Call it on a batch"):
        all_targets(model)


def test_targets_are_compared_by_identity(twins):
    one, other = find_targets(twins, "__ALL_PRUNABLE__")
    assert one in [one]
    assert one not in [other]
    assert len({one, other}) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read_as_float32(dtype):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype=dtype)])
    (target,) = find_targets(model, "__ALL_PRUNABLE__")
    assert target.read().dtype == np.float32
    target.write(np.arange(6, dtype="float32"))
    assert keras.backend.standardize_dtype(target.variable.dtype) == dtype
    np.testing.assert_array_equal(target.read(), np.arange(6))


@pytest.mark.parametrize(
    ("given", "mend"), [("m.keras", "Load it first"), (np.zeros(3), "It comes first, before data")]
)
def test_what_is_no_model_is_refused_in_each_entry(given, mend):
    x = np.zeros((4, 3), "float32")
    model = keras.Sequential([layers.Input((3,)), layers.Dense(2)])
    for work in (
        lambda: kw.prune(given, x, 0.5),
        lambda: kw.reconstruct(given, x, dense=model),
        lambda: kw.sensitivity(given, x),
        lambda: kw.sparsity_report(given),
        lambda: kw.reestimate_batchnorm(given, x),
    ):
        with pytest.raises(TypeError, match=f"model must be a keras.Model, got {type(given).__name__}. {mend}"):
            work()
    for callback in (kw.WoodFisherPruning(0.5, end_epoch=1), kw.KeepZeros(), kw.TrainableParams(["a"])):
        with pytest.raises(ValueError, match=f"{type(callback).__name__} has no model yet. Give it to fit"):
            callback.on_train_begin()


def test_a_model_that_makes_no_weights():
    with pytest.raises(ValueError, match="has no weights"):
        find_targets(keras.Sequential([layers.Input((3,)), layers.ReLU()]), "__ALL__")


def test_the_first_level_with_a_name_counts_and_one_without_effect_is_refused(nested):
    targets = find_targets(nested, "__ALL_PRUNABLE__")
    assert finals_of(targets, ((0.2, ("c/kernel",)), (0.9, ("__ALL_PRUNABLE__",)))) == [0.9, 0.9, 0.2]
    assert finals_of(targets[:2], ((0.2, ("c/kernel",)), (0.9, ("__ALL_PRUNABLE__",)))) == [0.9, 0.9]
    message = "The sparsity 0.2 has no effect: 'outer/c/kernel' belongs to 0.9, which stands before it"
    with pytest.raises(ValueError, match=message):
        finals_of(targets, ((0.9, ("__ALL_PRUNABLE__",)), (0.2, ("c/kernel",))))
    with pytest.raises(ValueError, match=message):
        kw.prune(nested, sparsity={0.9: ["__ALL_PRUNABLE__"], 0.2: ["c/kernel"]}, method="magnitude", verbose=0)


class Scaled(keras.layers.Layer):
    """A number, and a vector of one, beside each other."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), name="scale")
        self.shift = self.add_weight(shape=(1,), name="shift")

    def call(self, x):
        return x * self.scale + self.shift


def test_a_single_number_is_no_variable_to_prune():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense"), Scaled(name="own")])
    names = [target.variable.path for target in find_targets(model, ["__ALL__", "re:.*own.*"])]
    assert any(name.endswith("own/shift") for name in names) and not any(name.endswith("scale") for name in names)
    with pytest.raises(KeyError):
        find_targets(model, ["own/scale"])
