"""TensorFlow's SavedModel: a folder with the graph and the variables, zeros in full."""

import keras

from keras_woodfisher.deployment.exporting.formats import Request, Runner
from keras_woodfisher.deployment.exporting.tensors import FileTensor, is_weight, of_array


def write(model: keras.Model, path: str, request: Request) -> None:
    """Exports a model."""
    del request
    model.export(path, format="tf_saved_model", verbose=False)


def load(path: str) -> Runner:
    """The function `serve` of a SavedModel."""
    from keras_woodfisher_backends.tensorflow.exports import saved_model_runner

    return saved_model_runner(path)


def tensors(path: str) -> list[FileTensor]:
    """The variables with two axes or more."""
    from keras_woodfisher_backends.tensorflow.exports import saved_model_variables

    return [of_array(name, values) for name, values in saved_model_variables(path) if is_weight(values)]
