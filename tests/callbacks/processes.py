"""Prunes in every way, alone; as a command, in one of several processes that train together.

python processes.py RANK FOLDER GROUP:SIZE:PORT:ENGINE:SCENARIO,SCENARIO,... ...

A process is in one group after the other, as long as a group has its rank; what comes out is in GROUP + RANK.npz.
"""

import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BACKEND = os.environ["KERAS_BACKEND"]


@dataclass
class Place:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    parts: int = 1


def start(place, port, engine):
    """Joins the others; all of them begin with the same model then."""
    if engine == "model_parallel":
        import keras

        # The processes have found each other before.
        distribution = keras.distribution
        mesh = distribution.DeviceMesh((1, place.size), ("batch", "model"), distribution.list_devices("cpu"))
        layouts = distribution.LayoutMap(mesh)
        layouts["a/kernel"] = (None, "model")
        layouts["a/bias"] = ("model",)
        found = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False)
        distribution.set_distribution(found)
        return
    told = {"RANK": place.rank, "WORLD_SIZE": place.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    if engine == "plain":
        import torch

        torch.distributed.init_process_group("gloo")
        return
    page(port)


def leave():
    """Leaves the others, if this process is to join some again."""
    if BACKEND == "torch":
        import torch

        torch.distributed.destroy_process_group()


def page(port):
    """What the documentation shows for this backend."""
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text[text.index("# Several processes") :], re.DOTALL)
    (block,) = (block for block in blocks if ("torch" in block) == (BACKEND == "torch"))

    def build(kind):
        import keras

        layers = keras.layers
        inputs = keras.Input((8,))
        model = kind(inputs, layers.Dense(4)(layers.Dense(16, "relu")(inputs)))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    import numpy as np

    rng = np.random.default_rng(0)
    names = {"build": build, "x": rng.normal(size=(64, 8)).astype("float32"), "y": rng.integers(0, 4, 64)}
    exec(compile(block.replace("127.0.0.1:12345", f"127.0.0.1:{port}"), "docs/devices.md", "exec"), names)
    assert names["kw"].sparsity_report(names["model"]).pruned == 173


def text_of(thing):
    import numpy as np

    return np.frombuffer(str(thing).encode(), np.uint8)


class Scenarios:
    """What is done in each process.

    Attributes:
        found: What comes out of it, arrays by name.
    """

    def __init__(self, place=None):
        import keras
        import numpy as np

        rng = np.random.default_rng(0)
        self.place = place or Place()
        self.x = rng.normal(size=(128, 8)).astype("float32")
        self.y = (self.x[:, 0] + self.x[:, 1] > 0).astype("int32")
        self.quick = {"quality": "fast", "num_grads": 64, "fisher_block_size": 20, "verbose": 0}
        self.still = {"class_name": "SGD", "config": keras.optimizers.SGD(0.0).get_config()}
        self.found = {}
        self.folder = ""

    def run(self, wanted, file, warned):
        """Does what is wanted, one after the other, and writes what comes out."""
        import numpy as np

        for name in wanted:
            if hasattr(self, name):
                getattr(self, name)()
            else:
                # What there is so far: the process may end here.
                np.savez(file, **self.found)
                self.odd(name)
        self.found["warned"] = text_of([str(w.message) for w in warned if "keras_woodfisher" in w.filename])
        np.savez(file, **self.found)

    def model(self, optimizer="sgd", norm=False):
        import keras

        layers = keras.layers
        keras.utils.set_random_seed(0)
        kind = parallel() if BACKEND == "torch" and self.place.size > 1 else keras.Sequential
        middle = [layers.BatchNormalization(name="n")] if norm else []
        every = [layers.Input((8,)), layers.Dense(16, "relu", name="a"), *middle, layers.Dense(4, name="b")]
        made = kind(every, name="net")
        made.compile(keras.optimizers.get(optimizer), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    def note(self, name, made):
        from keras_woodfisher_backends.keras_internals.engines import whole_value

        self.found.update({f"{name} {variable.path}": whole_value(variable) for variable in made.trainable_variables})

    def fit(self, made, *callbacks, epochs=2, first=0, count=128):
        """Each process has its part of each batch."""
        parts = self.place.parts
        mine = slice(self.place.rank % parts, count, parts)
        settings = {"batch_size": 16 // parts, "shuffle": False, "verbose": 0}
        made.fit(self.x[mine], self.y[mine], epochs=epochs, initial_epoch=first, callbacks=list(callbacks), **settings)

    def pruner(self, **more):
        import keras_woodfisher as kw

        return kw.WoodFisherPruning(0.5, **{"end_epoch": 1.5, "num_grads": 4, "verbose": 0} | more)

    def updates(self):
        """The weights after each kind of update of equal weights, given the same examples."""
        import keras_woodfisher as kw

        for name, options in (
            ("fast", {}),
            ("ggn", {"fisher": "ggn"}),
            ("ridge", {"damp": 1e-3, "update": "independent"}),
            ("2:4", {"mask_type": "2:4"}),
            ("filter", {"mask_type": "filter"}),
            ("few", {"num_grads": 20, "fisher_block_size": 2000}),
        ):
            made = self.model()
            kw.prune(made, (self.x, self.y), 0.5, **self.quick | options)
            self.note(name, made)

    def others(self):
        """The same for what may be rounded otherwise."""
        import numpy as np

        import keras_woodfisher as kw

        made = self.model()
        kw.prune(made, (self.x, self.y), 0.5, method="woodfisher", num_grads=32, verbose=0)
        self.note("calibrated", made)
        # One process has no column of a single block.
        made = self.model()
        whole = {"fisher_block_size": None, "num_grads": 32, "verbose": 0}
        kw.prune(made, (self.x, self.y), 0.5, method="woodfisher", update="calibrated", **whole)
        self.note("calibrated whole", made)
        dense, made = self.model(), self.model()
        report = kw.prune(made, self.x, 0.5, verbose=0)
        self.note("reconstruct", made)
        self.found["errors"] = np.array([layer.error for layer in report.reconstruction.layers])
        self.found["report"] = text_of(report)
        self.found["examples"] = np.array(report.reconstruction.examples)
        kw.reconstruct(made, self.x, dense=dense, verbose=0)
        self.note("refit", made)
        report = kw.sensitivity(self.model(), (self.x, self.y), levels=[0.5], num_grads=32, verbose=0)
        entries = report.as_dict()["entries"]
        self.found["sensitivity"] = np.array([(entry["measured"], entry["predicted"]) for entry in entries])

    def training(self):
        """The weights after training, by samples and by buffered gradients."""
        import numpy as np
        from keras_woodfisher_backends.keras_internals.engines import whole_value

        import keras_woodfisher as kw

        ramp = {"start_epoch": 1, "init_sparsity": 0.3}
        for name, options in (("sampled", {"data": (self.x, self.y)}), ("buffered", {})):
            made, callback = self.model(self.still), self.pruner(**ramp, **options)
            self.fit(made, callback)
            self.note(f"still {name}", made)
            self.found[f"report {name}"] = text_of(callback.report())
            made = self.model("adam")
            self.fit(made, self.pruner(**ramp, **options), epochs=3)
            if not options:
                self.fit(made, kw.KeepZeros())
            self.note(f"moving {name}", made)
        self.given_ring()
        whole, parts = self.model("adam"), self.model("adam")
        self.fit(whole, self.pruner(**ramp, total_epochs=3), epochs=3)
        with tempfile.TemporaryDirectory() as folder:
            # Only the first one writes.
            self.fit(parts, self.pruner(**ramp, total_epochs=3), kw.BackupPruning(folder), epochs=1)
            self.found["files"] = np.array(len(os.listdir(folder)))
            self.fit(parts, self.pruner(**ramp, total_epochs=3), kw.BackupPruning(folder), first=1, epochs=3)
        pairs = zip(whole.trainable_variables, parts.trainable_variables, strict=True)
        self.found["resumed"] = np.array([np.array_equal(whole_value(one), whole_value(other)) for one, other in pairs])

    def given_ring(self):
        """An update by buffered gradients that are the same to the bit, however many processes there are."""
        from unittest import mock

        import numpy as np

        from keras_woodfisher.gradients.buffer import GradientBuffer

        def latest(ring, count, chunk=None):
            rows = np.random.default_rng(1).normal(size=(count, 8 * 16 + 16 * 4)).astype("float32")
            return (rows[place : place + 1] for place in range(count))

        made = self.model(self.still)
        with mock.patch.object(GradientBuffer, "latest", latest):
            self.fit(made, self.pruner(start_epoch=1))
        self.note("ring", made)

    def parting(self):
        """A training that is saved after an epoch, and goes on here; it may go on with another number of processes."""
        import keras_woodfisher as kw

        made, folder = self.model("adam"), Path(self.folder)
        self.fit(made, self.parted(), kw.BackupPruning(folder / "states", keep=None), epochs=1)
        # All of them read what they write, whoever's file is used.
        made.save(folder / f"parted{self.place.rank}of{self.place.size}.keras")
        self.fit(made, self.parted(), kw.BackupPruning(folder / "states", keep=None), first=1, epochs=3)
        self.note("parted", made)

    def parted(self):
        return self.pruner(start_epoch=1, init_sparsity=0.3, total_epochs=3, damp=1e-3)

    def statistics(self):
        """Statistics of BatchNorm, which torch lets differ, are averaged before an update, and the report says so."""
        import keras
        import numpy as np
        from keras_woodfisher_backends.keras_internals.engines import whole_value

        import keras_woodfisher as kw

        made = self.model("adam", norm=True)
        norm = made.get_layer("n")
        self.fit(made)
        self.found["own mean"] = whole_value(norm.moving_mean)
        callback = self.pruner(data=(self.x, self.y), start_epoch=0, end_epoch=1)
        after = []
        look = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: after or after.append(whole_value(norm.moving_mean))
        )
        self.fit(made, callback, look, epochs=1)
        self.found["shared mean"] = after[0]
        self.found["notes"] = text_of(callback.report())
        self.found["sparsity"] = np.array(kw.prune(made, (self.x, self.y), 0.7, **self.quick).sparsity)

    def stream(self):
        """Each process gives batches of its own, of which its share of the samples is taken."""
        import keras_woodfisher as kw

        rank, size = self.place.rank, self.place.size
        mine = slice(rank * 64 // size, (rank + 1) * 64 // size) if size > 1 else slice(0, 64)
        data = lambda: iter([(self.x[mine], self.y[mine])])  # noqa: E731
        made = self.model()
        report = kw.prune(made, data, 0.5, **self.quick | {"damp": 1e-3})
        self.note("stream", made)
        self.found["samples"] = text_of(report.as_dict()["samples"])

    def odd(self, kind):
        """One process does something else than the others: what do they say, and how soon?"""
        import numpy as np
        from keras_woodfisher_backends.keras_internals.engines import assign_whole, whole_value

        import keras_woodfisher as kw

        made, odd = self.model(self.still, norm=kind == "batchnorm"), Odd(kind, self)
        if odd.mine and kind in ("weights", "zeros"):
            kernel = whole_value(made.layers[0].kernel)
            changed = kernel * np.float32(1.001) if kind == "weights" else np.where(kernel > 0, kernel, 0.0)
            assign_whole(made.layers[0].kernel, changed)
        before = [whole_value(variable) for variable in made.weights]
        begin = time.perf_counter()
        try:
            with odd.broken():
                if kind == "batchnorm":
                    kw.reestimate_batchnorm(made, odd.again, verbose=0)
                elif kind == "later":
                    self.fit(made, self.pruner(data=odd.again, start_epoch=1, end_epoch=1.5))
                elif kind == "callback":
                    self.fit(made, kw.TrainableParams(["nothing" if odd.mine else "b/bias"], trainable=False))
                elif kind in ("zeros", "batches"):
                    self.fit(made, kw.KeepZeros(), epochs=1, count=64 if odd.mine and kind == "batches" else 128)
                else:
                    kw.prune(made, odd.data(), 0.5, **self.quick | odd.options())
            text = "pruned"
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is looked at
            text = f"{type(error).__name__}: {error}"
        pairs = zip(before, made.weights, strict=True)
        same = all(np.array_equal(one, whole_value(variable)) for one, variable in pairs)
        self.found[f"{kind} text"] = text_of(text)
        self.found[f"{kind} seconds"] = np.array(time.perf_counter() - begin)
        self.found[f"{kind} untouched"] = np.array(same)


class Odd:
    """What the last process does otherwise than the others."""

    def __init__(self, kind, scenarios):
        self.kind = kind
        self.mine = scenarios.place.rank == scenarios.place.size - 1
        self.x, self.y = scenarios.x, scenarios.y
        self.calls, self.sampling = 0, False

    def broken(self):
        from unittest import mock

        from keras_woodfisher.gradients.sources import SampledGradients
        from keras_woodfisher.model.targets import Target
        from keras_woodfisher.pruning.share import Share

        if self.kind == "loss":
            fill = SampledGradients.fill

            def filling(*args):
                self.sampling = True
                return fill(*args)

            return mock.patch.object(SampledGradients, "fill", filling)
        there = {"killed": Share, "interrupt": Share, "write": Target}
        if not self.mine or self.kind not in there:
            return mock.MagicMock()
        return mock.patch.object(there[self.kind], "write" if self.kind == "write" else "exchanged", self.stop)

    def stop(self, *args):
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("can't write") if self.kind == "write" else KeyboardInterrupt

    def data(self):
        if self.kind == "raises":
            return self.batches
        if self.kind == "empty":
            return lambda: iter([] if self.mine else [(self.x, self.y)])
        return (self.x[:-1], self.y[:-1]) if self.mine and self.kind == "data" else (self.x, self.y)

    def batches(self):
        for place in range(0, len(self.x), 16):
            if self.mine and place > 16:
                raise RuntimeError("broken on purpose")
            yield self.x[place : place + 16], self.y[place : place + 16]

    def again(self):
        """Data that fails when it is read amid the work, and not when it is looked at before."""
        self.calls += 1
        for place in range(0, len(self.x), 16):
            if self.mine and (self.calls > 2 if self.kind == "later" else place > 16):
                raise IndexError("no such file")
            yield self.x[place : place + 16], self.y[place : place + 16]

    def loss(self, y_true, y_pred):
        import keras

        if self.mine and self.sampling:
            raise OwnError("too far off")
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    def options(self):
        if self.kind == "loss":
            return {"loss": self.loss}
        return {"damp": 0.25} if self.mine and self.kind == "options" else {}


class OwnError(ValueError):
    """An error as users write them."""


def parallel():
    """On torch a model whose `fit` averages gradients over processes, as one writes it before Keras 3.16."""
    import keras
    import torch

    if keras.__version__ >= "3.16":
        return keras.Sequential

    class Parallel(keras.Sequential):
        def train_step(self, data):
            x, y = data
            trained = [weight.path for weight in self.trainable_weights]
            if vars(self).get("trained") != trained:
                vars(self)["trained"] = trained
                vars(self)["wrapped"] = torch.nn.parallel.DistributedDataParallel(self)
            self.zero_grad()
            y_pred = vars(self)["wrapped"](x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred, training=True)
            loss.backward()
            weights = self.trainable_weights
            with torch.no_grad():
                self.optimizer.apply([weight.value.grad for weight in weights], weights)
            return {"loss": loss}

    return Parallel


def main(rank, folder, *groups):
    import warnings

    if BACKEND == "torch":
        import torch

        torch.set_num_threads(1)
    folder, joined = Path(folder), False
    for group in groups:
        name, size, port, engine, wanted = group.split(":")
        if int(rank) >= int(size):
            break
        if joined:
            leave()
        place = Place(int(rank), int(size), int(size) if engine == "data_parallel" else 1)
        start(place, port, engine)
        joined = True
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            scenarios = Scenarios(place)
            scenarios.folder = folder
            scenarios.run(wanted.split(","), folder / f"{name}{rank}.npz", warned)
    sys.stdout.flush()
    # Engines wait for each other at the end, also for one that has gone.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
