import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from keras_woodfisher_backends import get_backend

import keras_woodfisher as kw

NAME = keras.backend.backend()
FRAMEWORKS = "('torch', 'tensorflow', 'jax', 'matplotlib', 'keras_woodfisher_backends.torch.backend')"


def run(code, backend):
    env = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.once
def test_importing_the_package_imports_no_framework_of_its_own():
    seen = run(
        "import sys, json, keras\n"
        f"loaded = lambda: [name for name in {FRAMEWORKS} if name in sys.modules]\n"
        "before = loaded()\n"
        "import keras_woodfisher as kw\n"
        "kw.prune, kw.WoodFisherPruning, kw.load_recipe\n"
        "print(json.dumps([before, loaded()]))",
        "jax",
    )
    assert seen[0] == seen[1], "nothing more than Keras imports by itself"
    assert not {"torch", "tensorflow", "keras_woodfisher_backends.torch.backend"} & set(seen[1])


@pytest.mark.once
def test_importing_the_package_imports_no_keras():
    seen = run(
        "import sys, json\n"
        "import keras_woodfisher as kw\n"
        "early = 'keras' in sys.modules\n"
        "from keras_woodfisher import KeepZeros, prune\n"
        "print(json.dumps([early, 'keras' in sys.modules, KeepZeros.__name__, prune.__name__, kw.prune is prune]))",
        NAME,
    )
    assert seen == [False, True, "KeepZeros", "prune", True]


def test_all_public_names_are_seen_by_people_and_type_checkers():
    (block,) = [node for node in ast.parse(Path(kw.__file__).read_text()).body if isinstance(node, ast.If)]
    declared = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(declared) == sorted(kw.__all__)
    assert set(kw.__all__) <= set(dir(kw))
    for name, module in declared.items():
        assert getattr(kw, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="module 'keras_woodfisher' has no attribute 'Prune'"):
        kw.Prune  # noqa: B018


@pytest.mark.once
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
