"""Throws mutated recipes at the loader: `make fuzz` (not part of the tests).

Each outcome must be a Recipe or a RecipeError, in less than a second.
"""

import argparse
import random
import time
from collections import Counter

from recipe_mutations import SEEDS, mutate

import keras_woodfisher as kw

LONGEST = 1.0


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--count", type=int, default=10_000)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    rng = random.Random(args.seed)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(args.count):
        text = mutate(rng, rng.choice(SEEDS))
        start = time.perf_counter()
        try:
            recipe = kw.load_recipe(text)
            outcomes["recipes"] += 1
            assert kw.load_recipe(str(recipe)) == recipe, f"number {number}: the canonical form differs:\n{text}"
        except kw.RecipeError as error:
            outcomes["errors with a line" if error.line else "errors without a line"] += 1
            assert error.message
        except Exception:
            print(f"number {number}:\n{text}")
            raise
        seconds = time.perf_counter() - start
        assert seconds < LONGEST, f"number {number} took {seconds:.2f} s:\n{text[:2000]}"
        slowest = max(slowest, seconds)
    print(f"{args.count} mutated recipes: {dict(outcomes)}, the slowest {slowest:.3f} s")


if __name__ == "__main__":
    main()
