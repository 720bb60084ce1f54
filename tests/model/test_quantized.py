"""Zeros of quantised layers: a weight is zero where a unit input brings nothing to an output of the layer."""

import keras
import numpy as np
import pytest
from keras import layers, ops, quantizers

import keras_woodfisher as kw
from keras_woodfisher.model.targets import all_targets
from keras_woodfisher.reports import zeros as reasons
from keras_woodfisher.reports.storage import target_storage

# Older ones have neither groups nor AWQ.
packed = pytest.mark.skipif(not hasattr(quantizers, "Int4QuantizationConfig"), reason="this Keras packs otherwise")
INT4 = [pytest.param(mode, marks=packed) for mode in ("int4", "int4/3")]

pytestmark = pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Keras collects garbage whenever a layer is quantised, which takes longer than all else here."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def sparse(rng, shape):
    values = rng.normal(size=shape).astype("float32")
    return np.where(rng.random(shape) < 0.5, 0.0, values)


def quantize(layer, mode):
    name, _, block = mode.partition("/")
    layer.quantize(name, **({"config": quantizers.Int4QuantizationConfig(block_size=int(block))} if block else {}))


def response(layer, x):
    """What a layer makes of unit inputs: its weights as it uses them."""
    layer.inputs_quantizer = None
    return ops.convert_to_numpy(layer(x))


def counted(model):
    """Shape, weights and zeros of each variable."""
    return {
        v.name.split("/")[-1]: (v.shape, v.weights, v.pruned) for v in kw.sparsity_report(model, "__ALL__").variables
    }


def zeros(array, shape=None):
    return (shape or array.shape, array.size, int((array == 0).sum()))


@pytest.mark.parametrize("mode", ["int8", *INT4])
@pytest.mark.parametrize("shape", [(7, 5), (4, 1), (1, 4), (1, 1), (6, 8)])
def test_dense(rng, mode, shape):
    layer = layers.Dense(shape[1], use_bias=False, name="d")
    model = keras.Sequential([keras.Input((shape[0],)), layer])
    layer.kernel.assign(sparse(rng, shape))
    quantize(layer, mode)
    if mode == "int8":
        expected = zeros(ops.convert_to_numpy(layer.kernel))
    else:
        expected = zeros(response(layer, np.eye(shape[0], dtype="float32")))
    assert counted(model) == {"kernel": expected}


@packed
@pytest.mark.parametrize("mode", INT4)
def test_einsum_dense(rng, mode):
    layer = layers.EinsumDense("ab,bcd->acd", (3, 5), name="e")
    model = keras.Sequential([keras.Input((7,)), layer])
    layer.kernel.assign(sparse(rng, (7, 3, 5)))
    quantize(layer, mode)
    assert counted(model) == {"kernel": zeros(response(layer, np.eye(7, dtype="float32")))}


@packed
@pytest.mark.parametrize("mode", INT4)
@pytest.mark.parametrize("tie", [True, False])
def test_embeddings(rng, mode, tie):
    layer = layers.ReversibleEmbedding(5, 7, tie_weights=tie)
    inputs = keras.Input((2,), dtype="int32")
    model = keras.Model(inputs, layer(layer(inputs), reverse=True))
    for variable in layer.weights:
        variable.assign(sparse(rng, variable.shape))
    quantize(layer, mode)
    expected = {"embeddings": zeros(ops.convert_to_numpy(layer(np.arange(5))))}
    if not tie:
        layer.inputs_quantizer = None
        back = ops.convert_to_numpy(layer(np.eye(7, dtype="float32"), reverse=True))
        expected["reverse_embeddings"] = zeros(back)
    assert counted(model) == expected


def calibrate(layer, mode, bits, rng):
    """Fills the variables of a layer as GPTQ and AWQ do: two groups of inputs, each with its own zero point."""
    if mode == "awq":
        config = quantizers.AWQConfig(dataset=["-"], tokenizer=object(), group_size=4)
    else:
        config = keras.quantizers.GPTQConfig(dataset=["-"], tokenizer=object(), weight_bits=bits, group_size=4)
    layer.quantize(mode, config=config)
    columns, groups = layer.kernel_scale.shape
    rows = layer.g_idx.shape[0]
    integers = rng.integers(0, 4, (columns, rows)).astype("uint8")
    stored = quantizers.pack_int4(integers, axis=0, dtype="uint8")[0] if bits == 4 else integers
    layer.quantized_kernel.assign(stored)
    layer.kernel_zero.assign(rng.integers(0, 3, (columns, groups)).astype("uint8"))
    layer.kernel_scale.assign(rng.uniform(0.5, 1.0, (columns, groups)))
    layer.g_idx.assign(np.arange(rows) % groups)
    del layer._kernel
    setattr(layer, f"is_{mode}_calibrated", True)


@packed
@pytest.mark.parametrize(
    ("mode", "bits", "outputs"), [("gptq", 2, 5), ("gptq", 4, 5), ("gptq", 8, 1), ("gptq", 4, 1), ("awq", 4, (3, 5))]
)
def test_gptq_and_awq(rng, mode, bits, outputs):
    einsum = isinstance(outputs, tuple)
    layer = layers.EinsumDense("ab,bcd->acd", outputs) if einsum else layers.Dense(outputs, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    calibrate(layer, mode, bits, rng)
    found = response(layer, np.eye(8, dtype="float32"))
    assert 0 < (found == 0).sum() < found.size
    assert counted(model) == {"kernel": zeros(found)}


@packed
def test_before_calibration_the_weights_in_use_are_counted(rng):
    layer = layers.Dense(5)
    model = keras.Sequential([keras.Input((8,)), layer])
    kernel = sparse(rng, (8, 5))
    layer.kernel.assign(kernel)
    layer.quantize("awq", config=quantizers.AWQConfig(dataset=["-"], tokenizer=object(), group_size=4))
    assert counted(model) == {"kernel": zeros(kernel)}


@packed
def test_what_can_not_be_read_is_told(rng):
    layer = layers.Dense(5, name="d")
    model = keras.Sequential([keras.Input((8,)), layer, layers.Dense(2)], name="m")
    layer.quantize("int4")
    layer.input_spec = keras.InputSpec(min_ndim=2, axes={-1: 9})  # as if it were stored otherwise
    report = kw.sparsity_report(model)
    assert report.weights == 10
    (told,) = report.left_out.variables
    assert (told.name, told.pruned, told.reason) == ("m/d/kernel", None, reasons.UNREADABLE)
    assert "quantised in a way that can't be read: 1 variable with 24 weights: m/d/kernel" in str(report)


@packed
def test_integers_of_four_bits_take_half_a_byte():
    layer = layers.Dense(5, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    kernel = np.zeros((8, 5), "float32")
    kernel[:, 0], kernel[3, 4] = 1.0, 1.0  # 9 weights, of 40
    layer.kernel.assign(kernel)
    layer.quantize("int4")
    target = next(t for t in all_targets(model) if t.variable.name == "kernel")
    found = target_storage(target)
    assert (found.dense, found.bitmask) == (24, 5 + 5)
    assert found.csr == 5 + 9 * 2 + 6 * 2, "values, column indices, row pointers of five outputs"
