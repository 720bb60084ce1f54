import json
import os
import subprocess
import sys

import keras
import pytest
from keras_woodfisher_backends import get_backend

FRAMEWORKS = "('torch', 'tensorflow', 'jax', 'matplotlib', 'keras_woodfisher_backends.torch.backend')"


def run(code, backend):
    env = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_no_framework_of_its_own():
    seen = run(
        "import sys, json, keras\n"
        f"loaded = lambda: [name for name in {FRAMEWORKS} if name in sys.modules]\n"
        "before = loaded()\n"
        "import keras_woodfisher\n"
        "print(json.dumps([before, loaded()]))",
        "jax",
    )
    assert seen[0] == seen[1], "nothing more than Keras imports by itself"
    assert not {"torch", "tensorflow", "keras_woodfisher_backends.torch.backend"} & set(seen[1])


def test_a_backend_without_gradients_is_refused_at_first_use():
    said = run(
        "import json, keras, keras_woodfisher as kw\n"
        "model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])\n"
        "assert kw.sparsity_report(model).weights == 6\n"
        "try:\n    kw.prune(model, sparsity=0.5, method='magnitude')\n"
        "except RuntimeError as error:\n    print(json.dumps(str(error)))",
        "numpy",
    )
    assert "KERAS_BACKEND is 'numpy'" in said
    assert "jax, tensorflow, torch" in said


@pytest.mark.parametrize("name", ["openvino", "numpy", "mxnet"])
def test_adapters_are_refused_by_name(name):
    with pytest.raises(RuntimeError, match=f"computes gradients: jax, tensorflow, torch.*KERAS_BACKEND is '{name}'"):
        get_backend(name)


def test_this_backend_has_an_adapter(backend):
    assert backend.name == keras.backend.backend()
