"""What is used of Keras's private parts, and that nothing else is."""

import ast
import inspect
import tomllib
import warnings
from pathlib import Path
from typing import NamedTuple

import keras
import keras_woodfisher_backends
import numpy as np
import pytest
from keras_woodfisher_backends import keras_internals
from keras_woodfisher_backends.keras_internals import (
    check_version,
    engines,
    graphs,
    models,
    optimizers,
    recurrence,
    saving,
    training,
)

import keras_woodfisher as kw

ROOT = Path(__file__).parents[2]
INTERNALS = Path(keras_internals.__file__).parent
SOURCES = [
    file
    for folder in (
        Path(kw.__file__).parent,
        Path(keras_woodfisher_backends.__file__).parent,
        *(ROOT / "examples", ROOT / "benchmarks"),
    )
    for file in folder.rglob("*.py")
    if INTERNALS not in file.parents
]
TREES = {file: ast.parse(file.read_text()) for file in SOURCES}


class Part(NamedTuple):
    """Something private: its name, what has it, and the functions of `keras_internals` that use it.

    `since` is the release that brought it; only the backend `on` has it, if that is named.
    """

    name: str
    where: str
    used_by: str
    since: str = "3.12"
    on: str | None = None


PARTS = [
    Part("_flatten_layers", "model", "layers_of"),
    Part("_layers", "layer", "sublayers_of"),
    Part("_trainable_variables", "layer", "own_weights"),
    Part("_non_trainable_variables", "layer", "own_state"),
    Part("_call_has_training_arg", "model", "infer"),
    Part("_remat_mode", "layer", "infer"),
    Part(
        "_compile_loss",
        "model",
        "compiled_losses, output_losses, compiled_loss_weights, trained_outputs, loss_outline, build_losses",
    ),
    Part("_user_loss", "compiled loss", "compiled_losses, trained_outputs, loss_outline"),
    Part("_user_loss_weights", "compiled loss", "compiled_loss_weights, trained_outputs, loss_outline"),
    Part("_flat_losses", "compiled loss", "output_losses"),
    Part("_compute_loss", "model", "compute_loss"),
    Part("_fn_kwargs", "loss", "loss_settings"),
    Part("get_keras_mask", "keras.src.backend.common.masking", "mask_of"),
    Part("set_keras_mask", "keras.src.backend.common.masking", "set_mask"),
    Part("rnn", "keras.src.backend", "loop_over_time"),
    Part("_dtype_policy", "layer", "float32_computation"),
    Part("_variable_dtype", "policy", "float32_computation"),
    Part("_losses_override", "model", "without_added_losses"),
    Part("_trainable_variables", "optimizer", "trained_variables, train_only"),
    Part("_trainable_variables_indices", "optimizer", "train_only"),
    Part("_iterations", "optimizer", "step_counter"),
    Part("_learning_rate", "optimizer", "learning_rate_of"),
    Part("_variables", "optimizer", "all_variables, set_all_variables"),
    Part("_get_variable_index", "optimizer", "slots_of, follow_change"),
    Part("_accumulators", "Adagrad", "slots_of"),
    Part("_accumulators", "Ftrl", "slots_of, follow_change"),
    Part("_linears", "Ftrl", "weight_slots, follow_change"),
    Part("_var_key", "optimizer", "train_only"),
    Part("_weight_decay_by_var_key", "optimizer", "train_only", since="3.16"),
    Part("_is_excluded_from_weight_decay", "optimizer", "train_only", since="3.16"),
    Part("_update_model_variables_moving_average", "optimizer", "follow_averages"),
    Part("_model_variables_moving_average", "optimizer", "follow_averages, weight_slots, MOVING_AVERAGES"),
    Part("_accumulated_gradients", "optimizer", "GRADIENT_SUMS"),
    Part("keras.src.backend.torch.", "module of Adam", "is_for_torch_alone", on="torch"),
    Part("_model", "callback", "model_of, without_model"),
    Part("_save_model", "BackupAndRestore", "before_backups, stock_backups"),
    Part("_jax_state", "model", "keep_edits, assign_between_steps", on="jax"),
    Part("_jax_state_synced", "model", "assign_between_steps", on="jax"),
    Part("_functional", "model", "Graphs, trained_outputs, graph_of"),
    Part("_run_through_graph", "functional model", "Graphs"),
    Part("_nodes_by_depth", "functional model", "Graphs, calls_of"),
    Part("_get_operation_for_node", "functional model", "Graphs"),
    Part("_outputs_struct", "functional model", "Graphs, trained_outputs"),
    Part("state", "variables of fit", "assign_between_steps", on="jax"),
    Part("_keras_history", "symbolic tensor", "sigmoid_outputs, input_layer_of"),
    Part("ask_to_proceed_with_overwrite", "keras.src.utils.io_utils", "may_overwrite"),
    Part("_layout", "variable", "riding_variable", on="jax"),
]


def missing(parts):
    """Which of them this Keras lacks on this backend, each with its users."""
    owners = _owners()

    def has(part):
        owner = owners[part.where]
        return part.name in owner if isinstance(owner, (str, tuple)) else hasattr(owner, part.name)

    here = [part for part in parts if part.on in (None, keras.backend.backend())]
    due = [part for part in here if keras_internals.release_of(part.since) <= keras_internals.RELEASE]
    return [f"{part.name} ({part.where}), used by {part.used_by}" for part in due if not has(part)]


def _owners():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = keras.optimizers.Adam(use_ema=True, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse")
    model.fit(np.zeros((2, 3)), np.zeros((2, 2)), verbose=0)
    adagrad, ftrl = keras.optimizers.Adagrad(), keras.optimizers.Ftrl()
    for other in (adagrad, ftrl):
        other.build(model.trainable_variables)
    return {
        "model": model,
        "functional model": model._functional,
        "layer": model.layers[0],
        "variable": model.layers[0].kernel,
        "symbolic tensor": model.outputs[0],
        "compiled loss": getattr(model, "_compile_loss", None),
        "loss": keras.losses.BinaryCrossentropy(),
        "policy": keras.DTypePolicy("float32"),
        "optimizer": optimizer,
        "Adagrad": adagrad,
        "Ftrl": ftrl,
        "callback": keras.callbacks.Callback(),
        "BackupAndRestore": keras.callbacks.BackupAndRestore("unused"),
        "keras.src.backend.common.masking": keras_internals.models.masking,
        "keras.src.backend": keras.src.backend,
        "keras.src.utils.io_utils": saving.io_utils,
        "module of Adam": type(optimizer).__module__,
        "variables of fit": inspect.unwrap(keras.Model.fit).__code__.co_varnames,
    }


def test_this_keras_has_every_private_part_that_is_used():
    assert not missing(PARTS)


def test_what_vanished_is_named_with_its_users():
    gone = [Part("_gone", "model", "layers_of"), Part("_moved", "variables of fit", "assign_between_steps")]
    assert missing(gone) == [
        "_gone (model), used by layers_of",
        "_moved (variables of fit), used by assign_between_steps",
    ]
    assert not missing([Part("_gone", "model", "layers_of", since="99.0"), Part("_gone", "model", "f", on="none")])


def test_the_table_is_complete():
    used = set()
    for file in INTERNALS.glob("*.py"):
        tree = ast.parse(file.read_text())
        used |= {name for name in _attributes(tree) if name.startswith("_") and not name.startswith("__")}
        used |= {text for text in _strings(tree) if text.startswith("_") and text.isidentifier()}
    assert used == {part.name for part in PARTS if part.name.startswith("_")}
    for part in PARTS:
        for name in part.used_by.split(", "):
            assert any(
                hasattr(module, name) for module in (engines, graphs, models, optimizers, recurrence, saving, training)
            )


def _attributes(tree):
    """Names of attributes that are read or written, but those of `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            yield node.attr


def _strings(tree):
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def private_uses(tree):
    """What a module uses of Keras's private parts: modules, attributes, and names for `vars` or `getattr`."""
    names = {part.name for part in PARTS if part.name.startswith("_")}
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    dotted = {node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "src"}
    inside = {text for text in modules | set(map(ast.unparse, dotted)) | set(_strings(tree)) if "keras.src" in text}
    return inside | names & (set(_attributes(tree)) | set(_strings(tree)))


@pytest.mark.parametrize(
    "code",
    [
        "import keras.src.layers",
        "from keras.src import ops",
        "keras.src.backend.get_keras_mask(x)",
        "import_module('keras.src.ops')",
        "model._flatten_layers()",
        "vars(optimizer)['_variables']",
        "getattr(model, '_jax_state', None)",
        "model._compile_loss = None",
    ],
)
def test_private_uses_are_seen(code):
    assert private_uses(ast.parse(code))


def test_nothing_else_uses_them():
    found = {str(file.relative_to(ROOT)): uses for file, tree in TREES.items() if (uses := private_uses(tree))}
    assert len(TREES) > 100 and not found


def test_no_callback_reads_keras_own_attribute_for_the_model():
    def below(kind):
        return [kind, *(inner for sub in kind.__subclasses__() for inner in below(sub))]

    assert all(getattr(kw, name) for name in kw.__all__)  # loads them
    ours = [kind for kind in below(keras.callbacks.Callback) if kind.__module__.startswith("keras_woodfisher.")]
    assert len(ours) > 5 and not [kind for kind in ours if "self._model" in inspect.getsource(kind)]


@pytest.mark.parametrize("version", ["2.15.0", "3.11.3", "3.17.0", "3.17.0.dev202612", "4.0.0", "unknown"])
def test_a_keras_that_was_not_tested_is_warned_of(version):
    expected = rf"tested with Keras 3\.12 to 3\.16, found {version}.*pip install 'keras>=3\.12,<3\.17'"
    with pytest.warns(UserWarning, match=expected):
        check_version(version)


@pytest.mark.parametrize("version", ["3.12.0", "3.15.1", "3.16.0.dev2026102704", "3.16.0rc0", keras.__version__])
def test_a_keras_that_was_tested_is_fine(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(version)


def test_the_package_asks_for_the_tested_range():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest, (major, newest) = keras_internals.OLDEST_TESTED, keras_internals.NEWEST_TESTED
    assert f"keras>={oldest[0]}.{oldest[1]},<{major}.{newest + 1}" in asked
