import numpy as np
import pytest

from keras_woodfisher.pruning.masks import count, grow, lowest


@pytest.mark.parametrize(
    ("sparsity", "total", "zeros"),
    [(0.0, 10, 0), (0.5, 5, 3), (0.25, 10, 3), (0.04, 10, 0), (0.05, 10, 1), (0.9, 1, 1), (0.4, 1, 0), (0.7, 0, 0)],
)
def test_halves_round_up(sparsity, total, zeros):
    assert count(sparsity, total) == zeros


def test_count_is_never_more_than_half_a_weight_off(rng):
    for sparsity, total in zip(rng.uniform(0, 1, 200), rng.integers(1, 10**7, 200), strict=True):
        assert abs(count(sparsity, int(total)) - sparsity * total) <= 0.5


@pytest.mark.parametrize("seed", range(60))
def test_lowest_is_the_head_of_a_stable_sort(seed):
    """Scores with many ties; a stable sort leaves equal scores in the order of their index."""
    rng = np.random.default_rng(seed)
    scores = rng.choice([-np.inf, 0.0, 0.5, 1.0, 1e30, rng.normal()], size=rng.integers(1, 40))
    for number in range(-1, scores.size + 2):
        expected = np.zeros(scores.size, bool)
        expected[sorted(range(scores.size), key=lambda i: scores[i])[: max(number, 0)]] = True
        np.testing.assert_array_equal(lowest(scores, number), expected)


def test_lowest_of_many():
    """NumPy sorts few scores as a whole, but of many only what it is asked for."""
    scores = np.random.default_rng(0).permutation(20_000).astype(float)
    for number in (1, 2, 9_999, 19_998, 19_999):
        np.testing.assert_array_equal(lowest(scores, number), scores < number)


def test_the_count_is_exact_when_all_scores_tie():
    chosen = lowest(np.full(1000, 0.25), 333)
    assert chosen.sum() == 333
    assert chosen[:333].all()


def test_nan_scores_are_refused():
    with pytest.raises(FloatingPointError, match="2 of 3 scores are NaN"):
        lowest(np.array([np.nan, 1.0, np.nan]), 1)


def case(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, rng.integers(1, 5))
    scores = rng.choice([rng.uniform(0, 1), 0.0, 0.5, 0.7], size=sizes.sum())
    pruned = rng.uniform(size=scores.size) < rng.choice([0.0, 0.3, 0.9])
    return rng, sizes, scores, pruned


@pytest.mark.parametrize("seed", range(60))
def test_grow_globally(seed):
    rng, sizes, scores, pruned = case(seed)
    sparsity = float(rng.uniform(0, 1))
    before = scores.copy(), pruned.copy()
    new = grow(scores, pruned, [(int(sizes.sum()), sparsity)])
    assert new.dtype == bool
    assert new.sum() == max(count(sparsity, scores.size), pruned.sum())
    assert not (pruned & ~new).any(), "what is pruned stays pruned"
    added = new & ~pruned
    if added.any() and not new.all():
        assert scores[added].max() <= scores[~new].min(), "no kept weight scores lower than a pruned one"
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(pruned, before[1])


@pytest.mark.parametrize("seed", range(60))
def test_grow_by_variable_is_each_variable_by_itself(seed):
    rng, sizes, scores, pruned = case(seed)
    fractions = rng.uniform(0, 1, len(sizes))
    new = grow(scores, pruned, [(int(n), float(s)) for n, s in zip(sizes, fractions, strict=True)])
    edges = np.cumsum(sizes)[:-1]
    for part, was, score, sparsity in zip(
        np.split(new, edges), np.split(pruned, edges), np.split(scores, edges), fractions, strict=True
    ):
        np.testing.assert_array_equal(part, grow(score, was, [(part.size, float(sparsity))]))
        assert part.sum() == max(count(sparsity, part.size), was.sum())


def test_growing_step_by_step_never_revives(rng):
    pruned = np.zeros(50, bool)
    for sparsity in (0.1, 0.5, 0.3, 0.9):
        new = grow(rng.normal(size=50), pruned, [(50, sparsity)])
        assert not (pruned & ~new).any()
        pruned = new
    assert pruned.sum() == 45
