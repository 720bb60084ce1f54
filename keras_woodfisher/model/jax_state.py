"""The state that Keras keeps beside the variables on JAX while it trains."""

import keras


def keep_edits(model: keras.Model) -> None:
    """Makes edits between two batches last on JAX, where a step that finds no more data puts the old state back."""
    if getattr(model, "_jax_state", None):
        kinds = ("trainable_variables", "non_trainable_variables", "metrics_variables")
        state = {kind: [v.value for v in getattr(model, kind)] for kind in kinds}
        model._jax_state = state | {"optimizer_variables": [v.value for v in model.optimizer.variables]}
