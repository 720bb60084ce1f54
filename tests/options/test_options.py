import inspect
import json

import keras
import numpy as np
import pytest

import keras_woodfisher as kw
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.sizes import parse_bytes

SHARED = [
    # Arguments that the callback, prune and PruningOptions have in common.
    ({"params": 3}, TypeError, r"params must be a name or a list of names, got 3\."),
    ({"params": ["a", 1]}, TypeError, r"params must be a name or a list of names, got \['a', 1\]"),
    ({"params": b"kernel"}, TypeError, "params must be a name or a list of names"),
    ({"params": ["re:(kernel"]}, ValueError, r"pattern 're:\(kernel' in params isn't a regular expression: .*"),
    ({"params": "re:*"}, ValueError, r"pattern 're:\*' in params isn't a regular expression: nothing to repeat"),
    ({"exclude": {"a": 1}}, TypeError, "exclude must be a name or a list of names"),
    ({"exclude": ["re:["]}, ValueError, r"pattern 're:\[' in exclude isn't a regular expression"),
    ({"method": "wood"}, ValueError, "method must be one of 'woodfisher', 'magnitude'.*, got 'wood'"),
    ({"method": None}, ValueError, "method must be one of .*, got None"),
    ({"update": "both"}, ValueError, "update must be one of 'joint', 'independent', 'calibrated', got 'both'"),
    ({"update": True}, ValueError, "update must be one of .*, got True"),
    ({"global_sparsity": 1}, TypeError, "global_sparsity must be True or False, got 1"),
    ({"num_grads": 0}, ValueError, "num_grads must be at least 1, got 0"),
    ({"num_grads": 2.0}, TypeError, r"num_grads must be a whole number, got 2\.0"),
    ({"num_grads": True}, TypeError, "num_grads must be a whole number, got True"),
    ({"num_grads": {}}, ValueError, r"num_grads as a dictionary needs the key 0\.0 .*got \{\}"),
    ({"num_grads": {0.5: 8}}, ValueError, r"needs the key 0\.0 \(the count to begin with\), got \{0\.5: 8\}"),
    ({"num_grads": {0.0: 8, 90: 9}}, ValueError, r"a key of num_grads must lie in \[0, 1\), got 90\..*write 0\.9"),
    ({"num_grads": {0.0: 8, "much": 9}}, TypeError, "a key of num_grads must be a fraction .*'much'"),
    ({"num_grads": {0.0: 0}}, ValueError, "a value of num_grads must be at least 1, got 0"),
    ({"num_grads": {0.0: 1.5}}, TypeError, r"a value of num_grads must be a whole number, got 1\.5"),
    ({"grad_batch_size": 0}, ValueError, "grad_batch_size must be at least 1, got 0"),
    ({"grad_batch_size": "4"}, TypeError, "grad_batch_size must be a whole number, got '4'"),
    ({"damp": 0.0}, ValueError, r"damp must be above 0, got 0\. Damping is added to the Fisher's diagonal"),
    ({"damp": -1e-5}, ValueError, "damp must be above 0, got -1e-05"),
    ({"damp": float("nan")}, ValueError, "damp must be above 0, got nan"),
    ({"damp": float("inf")}, ValueError, "damp must be above 0, got inf"),
    ({"damp": "1e-5"}, TypeError, "damp must be a number, got '1e-5'"),
    ({"damp": True}, TypeError, "damp must be a number, got True"),
    ({"damp": "much"}, TypeError, r"damp must be a number, got 'much'\. .*\"auto\" finds it from the samples"),
    ({"fisher": "exact"}, ValueError, "fisher must be one of 'empirical', 'ggn', got 'exact'"),
    ({"fisher_block_size": -1}, ValueError, r"fisher_block_size must be at least 0, got -1\. Write None for one block"),
    ({"fisher_block_size": 2e3}, TypeError, r"fisher_block_size must be a whole number, got 2000\.0"),
    ({"fisher_block_size": False}, TypeError, "fisher_block_size must be a whole number, got False"),
    ({"available_gpus": 0}, TypeError, "available_gpus must be a name or a list of names, got 0"),
    ({"available_gpus": [0]}, TypeError, r"available_gpus must be a name or a list of names, got \[0\]"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"seed": 0.5}, TypeError, r"seed must be a whole number, got 0\.5"),
    ({"verbose": 3}, ValueError, "verbose must be one of 0, 1, 2, got 3"),
    ({"verbose": "loud"}, ValueError, "verbose must be one of 0, 1, 2, got 'loud'"),
]
SHARED += [
    ({"memory_limit": "lots"}, ValueError, r"memory_limit must be a size, got 'lots'\. Give bytes, or .*4GiB"),
    ({"memory_limit": 0}, ValueError, "memory_limit must be at least one byte, got 0"),
    ({"memory_limit": 2.5}, TypeError, r"memory_limit must be a size, got 2\.5"),
    ({"grads_device": None}, TypeError, "grads_device must be .*, got None"),
    ({"grads_dtype": "bfloat16"}, ValueError, "grads_dtype must be one of 'float32', 'float16', got 'bfloat16'"),
    ({"num_pages": 0}, ValueError, "num_pages must be at least 1, got 0"),
    ({"num_pages": 2}, ValueError, "num_pages=2 is for one block .*got fisher_block_size=2000.*Leave num_pages out"),
]

OF_CALLBACK = [
    ({"num_recomputations": 0}, ValueError, "num_recomputations must be at least 1, got 0"),
    ({"num_recomputations": 1.5}, TypeError, r"num_recomputations must be a whole number, got 1\.5"),
    ({"update": "calibrated"}, ValueError, "update='calibrated' is for prune"),
    ({"final_sparsity": 90}, ValueError, r"final_sparsity must lie in \[0, 1\), got 90\. .* write 0\.9 for 90 %"),
    ({"final_sparsity": 1.0}, ValueError, r"final_sparsity must lie in \[0, 1\), got 1\. .*fraction of zeros\."),
    ({"final_sparsity": -0.5}, ValueError, r"final_sparsity must lie in \[0, 1\), got -0\.5"),
    ({"final_sparsity": float("nan")}, ValueError, r"final_sparsity must lie in \[0, 1\), got nan"),
    ({"final_sparsity": "0.9"}, TypeError, r"final_sparsity must be a fraction in \[0, 1\), got '0\.9'"),
    ({"final_sparsity": True}, TypeError, r"final_sparsity must be a fraction in \[0, 1\), got True"),
    ({"final_sparsity": {9: ["a"]}}, ValueError, r"a key of final_sparsity must lie in \[0, 1\), got 9"),
    ({"final_sparsity": {"x": ["a"]}}, TypeError, "a key of final_sparsity must be a fraction"),
    ({"final_sparsity": {}}, ValueError, "needs names for each sparsity"),
    ({"final_sparsity": {0.9: []}}, ValueError, "needs names for each sparsity"),
    ({"final_sparsity": {0.9: 3}}, TypeError, r"final_sparsity\[0.9\] must be a name or a list of names"),
    ({"final_sparsity": {0.9: ["a"]}, "params": ["b"]}, ValueError, r"so params must be empty, got \['b'\]"),
    ({"final_sparsity": {0.9: ["a"]}, "global_sparsity": True}, ValueError, "global_sparsity=True would overrule"),
    ({"final_sparsity": {0.9: ["a"], 0.3: ["b"]}, "init_sparsity": 0.5}, ValueError, "is above final_sparsity=0.3"),
    ({"init_sparsity": 5}, ValueError, r"init_sparsity must lie in \[0, 1\), got 5\..*write 0\.05 for 5 %"),
    ({"init_sparsity": "from"}, TypeError, "init_sparsity must be a fraction"),
    ({"init_sparsity": 0.95}, ValueError, r"init_sparsity=0\.95 is above final_sparsity=0\.8; sparsity never falls"),
    ({"start_epoch": -2}, ValueError, "start_epoch must be at least 0, or -1 for at once, got -2"),
    ({"start_epoch": "1"}, TypeError, "start_epoch must be a number, got '1'"),
    ({"start_epoch": 3}, ValueError, r"end_epoch=2 lies before start_epoch=3\. Swap or move them"),
    ({"end_epoch": -1}, ValueError, "end_epoch must be at least 0, got -1"),
    ({"end_epoch": float("inf")}, ValueError, "end_epoch must be at least 0, got inf"),
    ({"end_epoch": None}, TypeError, "end_epoch must be a number, got None"),
    ({"update_frequency": -0.5}, ValueError, r"update_frequency must be a positive .* 0 or -1 .*got -0\.5"),
    ({"update_frequency": "1"}, TypeError, "update_frequency must be a number, got '1'"),
    ({"inter_func": "quartic"}, ValueError, "inter_func must be one of 'linear', 'cubic', 'inverse_cubic'.*'quartic'"),
    ({"leave_enabled": "yes"}, TypeError, "leave_enabled must be True or False, got 'yes'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), SHARED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_is_refused_everywhere(wrong, error, message, make_mlp, blobs):
    with pytest.raises(error, match=message):
        PruningOptions(**wrong)
    with pytest.raises(error, match=message):
        kw.WoodFisherPruning(0.8, end_epoch=2, data=blobs, **wrong)
    if wrong not in ({"num_grads": {}}, {"method": None}):
        with pytest.raises(error, match=message):
            kw.prune(None, blobs, 0.5, **wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"), OF_CALLBACK, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_what_the_callback_refuses(wrong, error, message):
    with pytest.raises(error, match=message):
        kw.WoodFisherPruning(**({"final_sparsity": 0.8, "end_epoch": 2} | wrong))


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (80, ValueError, r"sparsity must lie in \[0, 1\), got 80\. .* write 0\.8 for 80 %"),
        (1, ValueError, r"sparsity must lie in \[0, 1\), got 1\."),
        ("half", TypeError, "sparsity must be a fraction .*'half'"),
    ],
)
def test_the_sparsity_of_prune(sparsity, error, message, make_mlp, blobs):
    with pytest.raises(error, match=message):
        kw.prune(make_mlp(), blobs, sparsity)


def test_keep_zeros_refuses_what_are_no_names():
    with pytest.raises(TypeError, match="params must be a name or a list of names, got 1"):
        kw.KeepZeros(params=1)
    with pytest.raises(ValueError, match="in exclude isn't a regular expression"):
        kw.KeepZeros(exclude=["re:("])


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="fisher_blocksize"):
        kw.WoodFisherPruning(0.8, end_epoch=2, fisher_blocksize=10)


UNUSUAL = {
    "mask_type": [2, 4],
    "final_sparsity": 0.75,
    "end_epoch": 7.5,
    "init_sparsity": "__FROM_PARAM__",
    "start_epoch": -1,
    "update_frequency": 0.25,
    "inter_func": "linear",
    "leave_enabled": False,
    "log_variables": True,
    "params": ["a/kernel", "re:b.*"],
    "exclude": ["c/kernel"],
    "global_sparsity": False,
    "num_grads": {0.5: 32, 0.0: 16},
    "grad_batch_size": 2,
    "fisher": "ggn",
    "damp": 1e-3,
    "num_recomputations": 2,
    "fisher_block_size": None,
    "update": "independent",
    "method": "magnitude",
    "available_gpus": ["cpu:0", "cpu:1"],
    "memory_limit": "3 GiB",
    "grads_device": "disk",
    "grads_dtype": "float16",
    "num_pages": 3,
    "seed": None,
    "verbose": 2,
    "total_epochs": 9,
}


def test_the_table_of_unusual_values_is_complete():
    arguments = inspect.signature(kw.WoodFisherPruning).parameters
    assert set(UNUSUAL) == set(arguments) - {"data"}
    defaults = {name: p.default for name, p in arguments.items() if name in UNUSUAL}
    assert all(UNUSUAL[name] != default for name, default in defaults.items())


def test_get_config_holds_what_was_given_and_goes_through_json(blobs):
    first = kw.WoodFisherPruning(**UNUSUAL, data=blobs)
    config = first.get_config()
    assert config == UNUSUAL
    read = json.loads(json.dumps(config))
    second = kw.WoodFisherPruning.from_config(read, data=blobs)
    assert second.get_config() == config
    assert second.options == first.options
    assert second.task.schedule == first.task.schedule


def test_the_defaults_go_through_json():
    first = kw.WoodFisherPruning(0.9, end_epoch=3)
    second = kw.WoodFisherPruning.from_config(json.loads(json.dumps(first.get_config())))
    assert second.get_config() == first.get_config()
    assert first.get_config()["num_grads"] == 64


def test_numbers_of_numpy_go_through_json():
    first = kw.WoodFisherPruning(np.float32(0.5), end_epoch=np.float32(2), init_sparsity=np.float64(0.25))
    config = json.loads(json.dumps(first.get_config()))
    assert (config["final_sparsity"], config["end_epoch"], config["init_sparsity"]) == (0.5, 2.0, 0.25)


def test_a_config_needs_no_data():
    config = kw.WoodFisherPruning(0.5, end_epoch=1, data=lambda: iter([]), grad_batch_size=4).get_config()
    assert kw.WoodFisherPruning.from_config(config).get_config() == config


def test_changing_a_config_does_not_change_the_callback():
    callback = kw.WoodFisherPruning(0.9, end_epoch=3, params=["a"], num_grads={0.0: 4})
    config = callback.get_config()
    config["params"].append("b")
    config["num_grads"][0.5] = 8
    assert callback.get_config()["params"] == ["a"]
    assert callback.get_config()["num_grads"] == {0.0: 4}


def test_keep_zeros_config():
    for kwargs in ({"params": ["a", "re:b"], "exclude": ["c"]}, {"params": "__ALL__", "exclude": "c"}, {}):
        first = kw.KeepZeros(**kwargs)
        config = json.loads(json.dumps(first.get_config()))
        assert kwargs.items() <= config.items()
        assert kw.KeepZeros.from_config(config).get_config() == config


def test_numbers_of_numpy_are_taken_and_kept_as_plain_ones():
    options = PruningOptions(
        num_grads=np.int64(8),
        grad_batch_size=np.int32(2),
        damp=np.float32(0.5),
        fisher_block_size=np.int64(10),
        seed=np.int64(3),
    )
    values = [options.num_grads, options.grad_batch_size, options.damp, options.fisher_block_size, options.seed]
    assert json.dumps(values) == "[8, 2, 0.5, 10, 3]"


@pytest.mark.parametrize("size", [None, 0])
def test_no_block_size_means_one_block(size):
    assert PruningOptions(fisher_block_size=size).fisher_block_size is None


def test_one_name_is_a_list_of_one_and_none_is_none():
    options = PruningOptions(exclude="a", available_gpus="cpu:0", params=None)
    assert (options.exclude, options.available_gpus, options.params) == (("a",), ("cpu:0",), ())
    assert PruningOptions(available_gpus=None).available_gpus == ()
    assert PruningOptions(verbose="auto").verbose == 1


@pytest.mark.parametrize(
    ("sparsity", "samples"),
    [(0.0, 256), (0.4999, 256), (0.5, 512), (0.5 - 1e-12, 512), (0.74, 512), (0.75, 1024), (0.829, 1024), (0.99, 1400)],
)
def test_the_count_of_the_largest_key_at_or_below_the_sparsity(sparsity, samples):
    options = PruningOptions(num_grads={0.83: 1400, 0.0: 256, 0.75: 1024, 0.5: 512})
    assert options.gradients_at(sparsity) == samples
    assert options.most_gradients == 1400


def test_a_single_count_holds_at_every_sparsity():
    options = PruningOptions(num_grads=7)
    assert {options.gradients_at(s) for s in (0.0, 0.5, 0.99)} == {7}
    assert options.most_gradients == 7


def test_the_largest_count_need_not_come_last():
    assert PruningOptions(num_grads={0.0: 100, 0.5: 10}).most_gradients == 100


def test_the_callers_dictionary_is_copied():
    counts = {0.0: 4}
    options = PruningOptions(num_grads=counts)
    counts[0.0] = 5
    assert options.gradients_at(0.2) == 4


@pytest.mark.parametrize("limit", [10**9, np.int64(10**9), 1e9, "1GB"])
def test_a_size_is_a_whole_number_of_any_kind(limit):
    assert parse_bytes("memory_limit", PruningOptions(memory_limit=limit).memory_limit) == 10**9


def test_a_variable_in_place_of_its_name():
    layer = keras.layers.Dense(3, name="d")
    layer.build((None, 2))
    with pytest.raises(TypeError, match=r"got the variable d/kernel itself\. Give its name: 'd/kernel'"):
        PruningOptions(params=[layer.kernel])
    with pytest.raises(TypeError, match="must be a name or a list of names, got") as found:
        PruningOptions(params=[np.zeros(10_000)])
    assert len(str(found.value)) < 300
