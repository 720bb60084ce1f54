"""Fits that hypothesis composes, and what must hold of each: the parts of `test_composed_fits.py`."""

import contextlib
import warnings

import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers, ops, optimizers
from keras_woodfisher_backends.keras_internals import RELEASE
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible

import keras_woodfisher as kw

BACKEND = keras.backend.backend()
STEPS, BATCH, CLASSES = 4, 8, 3
EXAMPLES = STEPS * BATCH

OPTIMIZERS = {
    "sgd": lambda **k: optimizers.SGD(0.02, momentum=0.9, nesterov=True, **k),
    "adam": lambda **k: optimizers.Adam(0.01, amsgrad=True, **k),
    "adamw": lambda **k: optimizers.AdamW(0.01, weight_decay=0.1, **k),
    "lion": lambda **k: optimizers.Lion(0.003, **k),
    "nadam": lambda **k: optimizers.Nadam(0.01, **k),
    "adamax": lambda **k: optimizers.Adamax(0.01, **k),
    "adafactor": lambda **k: optimizers.Adafactor(0.01, **k),
    "rmsprop": lambda **k: optimizers.RMSprop(0.005, momentum=0.5, centered=True, **k),
    "adagrad": lambda **k: optimizers.Adagrad(0.05, **k),
    "adadelta": lambda **k: optimizers.Adadelta(0.5, **k),
    "lamb": lambda **k: optimizers.Lamb(0.01, **k),
    "ftrl": lambda **k: optimizers.Ftrl(0.05, **k),
}
if hasattr(optimizers, "ScheduleFreeAdamW"):
    OPTIMIZERS["schedule_free"] = lambda **k: optimizers.ScheduleFreeAdamW(0.01, **k)
if BACKEND != "tensorflow" or RELEASE >= (3, 13):
    OPTIMIZERS["muon"] = lambda **k: optimizers.Muon(0.01, **k)
if hasattr(optimizers, "MultiOptimizer"):
    OPTIMIZERS["multi"] = lambda **k: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.SGD(0.02, **k), {".*out.*": optimizers.Adam(0.01, **k)})
    )

KNOBS = {
    "plain": {},
    "ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipped": {"clipnorm": 1.0, "weight_decay": 0.01},
}


def dense():
    return (12,), [layers.Dense(16, activation="relu", name="hidden"), layers.Dropout(0.1)]


def constrained():
    unit = keras.constraints.UnitNorm(axis=0)
    return (12,), [layers.Dense(16, kernel_constraint=unit, kernel_regularizer="l2", name="hidden"), layers.ReLU()]


def convolution():
    return (6, 6, 2), [
        layers.Conv2D(4, 3, name="first", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.SeparableConv2D(6, 3, name="separable"),
        layers.Flatten(),
    ]


def recurrent():
    return (5, 4), [layers.GRU(6, name="gru"), layers.LayerNormalization()]


def attention():
    return (5, 4), [layers.EinsumDense("abc,cd->abd", (None, 8), name="einsum"), layers.GlobalAveragePooling1D()]


LAYERS = {"dense": dense, "constrained": constrained, "convolution": convolution, "recurrent": recurrent}
LAYERS["attention"] = attention


def model_of(case):
    """The model and its data; `case` is one of `CASES`."""
    shape, middle = LAYERS[case["layers"]]()
    head = layers.Dense(CLASSES, name="out", dtype="float32")
    model = keras.Sequential([keras.Input(shape), *middle, head])
    optimizer = OPTIMIZERS[case["optimizer"]](**KNOBS[case["knobs"]])
    if case["policy"] == "mixed_float16" or case["scaled"]:
        optimizer = optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
    steps = case["steps_per_execution"] if several_steps_are_possible() else 1
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, run_eagerly=case["eager"], steps_per_execution=steps)
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, EXAMPLES).astype("int32")
    x = rng.normal(size=(EXAMPLES, *shape)) + 0.5 * y.reshape(-1, *[1] * len(shape))
    return model, (x.astype("float32"), y)


class Batches(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self._data = data

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return tuple(part[index * BATCH : (index + 1) * BATCH] for part in self._data)


def endless(data):
    while True:
        yield from (Batches(data)[index] for index in range(STEPS))


def streamed(data):
    """The backend's own kind of data set."""
    if BACKEND == "torch":
        import torch

        pairs = torch.utils.data.TensorDataset(*map(torch.from_numpy, data))
        return torch.utils.data.DataLoader(pairs, batch_size=BATCH)
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH)


def given_to_fit(kind, data):
    """The arguments of `fit` that are about data."""
    if kind == "arrays":
        return {"x": data[0], "y": data[1], "batch_size": BATCH}
    if kind == "generator":
        return {"x": endless(data), "steps_per_epoch": STEPS}
    return {"x": Batches(data) if kind == "pydataset" else streamed(data)}


def others(case, folder):
    """Callbacks beside the pruner."""
    found = {
        "trainable": lambda: kw.TrainableParams(["out/bias"], trainable=False, start_epoch=0.5, end_epoch=1.5),
        "rate": lambda: kw.SetLearningRate(0.003, start_epoch=0.5),
        "decay": lambda: kw.SetWeightDecay(0.02, start_epoch=1),
        "checkpoint": lambda: keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        "nan": keras.callbacks.TerminateOnNaN,
        "swap": lambda: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
    }
    wanted = [name for name in case["callbacks"] if name != "swap" or case["knobs"].startswith("ema")]
    return [found[name]() for name in wanted]


def pruner_of(case, data):
    """The pruner of a case. Buffered gradients need steps before the first update."""
    start = case["start"] if case["source"] != "buffer" else max(case["start"], 0.5)
    return kw.WoodFisherPruning(
        case["final"],
        init_sparsity=case["final"] * case["init"],
        start_epoch=start,
        end_epoch=min(start + case["length"], case["epochs"]),
        update_frequency=case["frequency"],
        inter_func=case["inter_func"],
        leave_enabled=case["leave_enabled"],
        global_sparsity=case["global"],
        method="magnitude" if case["source"] == "magnitude" else "woodfisher",
        data=data if case["source"] == "data" else None,
        num_grads=2,
        verbose=0,
    )


CASES = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "knobs": st.sampled_from(sorted(KNOBS)),
        "scaled": st.booleans(),
        "policy": st.sampled_from(["float32", "mixed_float16", "mixed_bfloat16"]),
        "layers": st.sampled_from(sorted(LAYERS)),
        "data": st.sampled_from(["arrays", "generator", "pydataset", "stream"]),
        "eager": st.booleans(),
        "steps_per_execution": st.sampled_from([1, 2]),
        "source": st.sampled_from(["magnitude", "buffer", "data"]),
        "final": st.sampled_from([0.5, 0.8, 0.33]),
        "init": st.sampled_from([0.0, 0.4]),
        "start": st.sampled_from([0.0, 0.5, 1.0]),
        "length": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "frequency": st.sampled_from([0.25, 1.0, -1]),
        "inter_func": st.sampled_from(["cubic", "linear"]),
        "leave_enabled": st.booleans(),
        "global": st.booleans(),
        "epochs": st.sampled_from([2, 3]),
        "callbacks": st.lists(
            st.sampled_from(["trainable", "rate", "decay", "checkpoint", "nan", "swap"]), unique=True, max_size=3
        ),
        "broken": st.booleans(),
    }
)


class Watch(keras.callbacks.Callback):
    """What must hold after each batch."""

    def __init__(self, pruner, break_at):
        super().__init__()
        self._pruner, self._break_at = pruner, break_at
        self._done, self._sparsity = 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        model, run = self.model, self._pruner.run
        weights = {id(t.variable): ops.convert_to_numpy(t.variable) for t in run.targets}
        assert all(np.isfinite(value).all() for value in weights.values())
        if not released(run):
            for target, mask in zip(run.targets, run.pruner.masks(), strict=True):
                assert not weights[id(target.variable)][mask].any(), f"{target.name} regrew"
            assert logs["sparsity"] >= self._sparsity, "the sparsity fell"
            zeros = sum(int(mask.sum()) for mask in run.pruner.masks())
            size = sum(target.size for target in run.targets)
            np.testing.assert_allclose(logs["sparsity"], zeros / size)
            self._sparsity = logs["sparsity"]
        assert not any("woodfisher" in layer.name for layer in model.layers)
        self._done += 1
        if self._done == self._break_at:
            raise InterruptedError


def released(run):
    return not run.task.leave_enabled and run.done == run.task.schedule.end


@contextlib.contextmanager
def policy(name):
    """Computes in a precision meanwhile, without a word about things that are drawn on purpose."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        keras.config.set_dtype_policy(before)
