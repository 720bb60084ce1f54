"""Prunes in every way, on the devices that there are; as a command, on several devices of one process.

python engines.py ENGINE FILE    writes what comes out of each way to an .npz
"""

import os
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

ENGINES = {"tensorflow": ["mirrored"], "jax": ["data_parallel", "model_parallel"], "torch": []}
PAGE = {"mirrored", "data_parallel"}


def start(engine):
    """Sets up an engine on two devices; gives the scope in which it makes a model."""
    if engine == "mirrored":
        import tensorflow as tf

        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope
    import keras

    distribution = keras.distribution
    devices = distribution.list_devices("cpu")
    if engine == "data_parallel":
        distribution.set_distribution(distribution.DataParallel(devices=devices))
    else:
        layouts = distribution.LayoutMap(distribution.DeviceMesh((1, 2), ("batch", "model"), devices))
        layouts[".*kernel"] = (None, "model")
        layouts[".*bias"] = ("model",)
        distribution.set_distribution(distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
    return nullcontext


def results(scope=nullcontext):
    """The weights after each way of pruning a model that begins alike, and what was seen on the way."""
    import keras
    import numpy as np

    import keras_woodfisher as kw

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype("float32")
    y = (x[:, 0] + x[:, 1] > 0).astype("int32")
    found = {}

    def model(optimizer):
        keras.utils.set_random_seed(0)
        layers = keras.layers
        with scope():
            made = keras.Sequential([layers.Input((8,)), layers.Dense(16, "relu", name="a"), layers.Dense(4, name="b")])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            made.compile(keras.optimizers.get(optimizer), loss)
        return made

    def note(name, made):
        found.update({f"{name} {v.path}": keras.ops.convert_to_numpy(v) for v in made.trainable_variables})

    quick = {"quality": "fast", "num_grads": 32, "verbose": 0}
    for name, data, options in (
        ("fast", (x, y), quick),
        ("ggn 2:4", (x, y), quick | {"fisher": "ggn", "mask_type": "2:4"}),
        ("reconstruct", x, {"verbose": 0}),
    ):
        made = model("sgd")
        kw.prune(made, data, 0.5, **options)
        note(name, made)
    made = model("sgd")
    report = kw.sensitivity(made, (x, y), levels=[0.5], num_grads=16, verbose=0)
    found["sensitivity"] = np.array([entry["measured"] for entry in report.as_dict()["entries"]])

    def fit(made, *callbacks, first=0, epochs=2):
        settings = {"batch_size": 16, "shuffle": False, "verbose": 0, "initial_epoch": first, "epochs": epochs}
        made.fit(x, y, callbacks=list(callbacks), **settings)

    def pruner(**more):
        return kw.WoodFisherPruning(0.5, **{"end_epoch": 1.5, "num_grads": 4, "verbose": 0} | more)

    # Steps of no length: the weights of each update are equal.
    still = keras.optimizers.SGD(0.0).get_config()
    ramp = {"start_epoch": 1, "init_sparsity": 0.3, "damp": 1e-3}
    ring = Ring(pruner(**ramp))
    for name, callbacks in (("sampled", [pruner(**ramp, data=(x, y))]), ("buffered", [ring.pruner, ring.callback])):
        made = model({"class_name": "SGD", "config": still})
        seen = []
        look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs, s=seen: s.append(logs["sparsity"]))
        fit(made, *callbacks, look)
        note(name, made)
        found[f"{name}: sparsity"] = np.array(seen)
        found[f"{name}: stock"] = np.array([len(made.optimizer.variables)])
    found["rows"], found["seen"] = ring.rows, np.array(ring.seen)
    found["mask devices"] = np.array(ring.devices)
    # In two parts as in one, while training goes on: zeros, exactly so many.
    whole, parts = model("adam"), model("adam")
    fit(whole, pruner(**ramp, total_epochs=3), epochs=3)
    found["trained"] = np.array([kw.sparsity_report(whole).pruned])
    with tempfile.TemporaryDirectory() as folder:
        fit(parts, pruner(**ramp, total_epochs=3), kw.BackupPruning(folder), epochs=1)
        fit(parts, pruner(**ramp, total_epochs=3), kw.BackupPruning(folder), first=1, epochs=3)
    pairs = zip(whole.variables, parts.variables, strict=True)
    found["resumed"] = np.array([np.array_equal(*map(keras.ops.convert_to_numpy, pair)) for pair in pairs])
    # A weight that the optimizer doesn't know yet.
    made = model("adam")
    before = keras.ops.convert_to_numpy(made.get_layer("a").kernel)
    made.get_layer("a").trainable = False
    with scope():
        made.compile("adam", made.loss)
    kw.prune(made, sparsity=0.5, params=["b/kernel"], method="magnitude", verbose=0)
    fit(made, kw.KeepZeros(), kw.TrainableParams(["a/kernel"], start_epoch=1))
    found["thawed"] = np.array([(keras.ops.convert_to_numpy(made.get_layer("a").kernel) != before).any()])
    found["held"] = np.array([kw.sparsity_report(made, ["b/kernel"]).pruned])
    return found


class Ring:
    """Looks at the gradients that are buffered, at the end of the first epoch, and at where masks are."""

    def __init__(self, pruner):
        import keras

        self.pruner = pruner
        self.callback = keras.callbacks.LambdaCallback(on_epoch_end=self.look)

    def look(self, epoch, logs):
        if epoch == 0:
            self.pruner.model  # noqa: B018 - on JAX this puts the variables in place
            self.rows, self.seen = self.pruner.run.buffer.ring.contents()
            masks = [v.value for v in self.pruner.model.optimizer.variables if "mask" in v.path]
            self.devices = [copies(mask) for mask in masks]


def copies(value):
    """How many devices hold a variable's value, or a part of it, and how large such a part is."""
    if hasattr(value, "sharding"):
        return len(value.sharding.device_set), value.addressable_shards[0].data.size
    parts = getattr(value, "values", [value])
    return len(parts), int(parts[0].shape.num_elements())


def page():
    """What the documentation shows for this backend; TensorFlow's strategy takes both devices."""
    import keras
    import numpy as np

    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text[: text.index("# Several processes")], re.DOTALL)
    (block,) = (block for block in blocks if ("tensorflow" in block) == (keras.backend.backend() == "tensorflow"))
    rng = np.random.default_rng(0)

    def build():
        model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(4)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    names = {"build": build, "x": rng.normal(size=(64, 8)).astype("float32"), "y": rng.integers(0, 4, 64)}
    exec(compile(block, "docs/devices.md", "exec"), names)
    return np.array(names["kw"].sparsity_report(names["model"]).sparsity)


if __name__ == "__main__":
    chosen, file = sys.argv[1:]
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow

        halves = [tensorflow.config.LogicalDeviceConfiguration()] * 2
        tensorflow.config.set_logical_device_configuration(tensorflow.config.list_physical_devices("CPU")[0], halves)
    import numpy

    found = results(start(chosen))
    # The page sets up the first engine once more.
    numpy.savez(file, **found | ({"page": page()} if chosen in PAGE else {}))
