"""Runs every benchmark on every backend, each in a process of its own, and writes a table of the results."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BACKENDS = ("torch", "tensorflow", "jax")
BENCHMARKS = (
    "kernel_speed",
    "growth",
    "gradient_cost",
    "whole_update",
    "update_cost",
    "zeros_cost",
    "recipe_check",
    "kernel_accuracy",
    "memory",
    "one_shot",
    "accuracy",
    "structured",
    "batchnorm",
    "gradual",
    "gpu_speed",
)
SHARED = ("kernel_speed", "growth")
"""Of the CPU kernel, which all backends use: run once, without a model."""


ON_GPU = ("gpu_speed",)
"""Of the kernel of a GPU: only where the backend sees one, without a model."""

_LETTERS = {"d": "weights", "m": "num_grads", "B": "fisher_block_size"}


def main() -> None:
    args = argparse.ArgumentParser(
        description=__doc__, epilog="What isn't known here goes to each benchmark, such as --model, --train and --val."
    )
    args.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    args.add_argument("--only", nargs="+", default=BENCHMARKS, choices=BENCHMARKS)
    args, passed = args.parse_known_args()
    for benchmark in args.only:
        for backend in args.backends[:1] if benchmark in SHARED else args.backends:
            if benchmark in ON_GPU and not _sees_gpu(backend):
                print("==", benchmark, backend, "sees no GPU", flush=True)
                continue
            _run(benchmark, backend, [] if benchmark in (*SHARED, *ON_GPU) else passed)
        if benchmark == "one_shot" and len(args.backends) > 1:
            files = [str(HERE / "results" / f"masks_{backend}.npz") for backend in args.backends]
            subprocess.run([sys.executable, str(HERE / "compare_masks.py"), *files], check=True)
    table = "\n".join(_rows())
    (HERE / "results" / "README.md").write_text(f"# Results\n\n{table}\n")
    print(table)


def _sees_gpu(backend: str) -> bool:
    # In a process of its own: a framework that has started keeps a GPU's memory.
    code = f"from keras_woodfisher_backends import get_backend; print(*get_backend({backend!r}).devices())"
    command = [sys.executable, "-c", code]
    names = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment(backend)).stdout
    return any(not name.startswith("cpu") for name in names.split())


def _environment(backend: str) -> dict[str, str]:
    return {**os.environ, "KERAS_BACKEND": backend}


def _run(benchmark: str, backend: str, passed: list[str]) -> None:
    command = [sys.executable, str(HERE / f"{benchmark}.py"), *passed]
    if benchmark == "one_shot":
        (HERE / "results").mkdir(exist_ok=True)
        command += ["--masks", str(HERE / "results" / f"masks_{backend}.npz")]
    print("==", benchmark, backend, flush=True)
    subprocess.run(command, check=True, env=_environment(backend))


def _rows() -> list[str]:
    rows = ["| benchmark | backend | figure | value |", "|---|---|---|---|"]
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        name = path.stem.removesuffix(f"_{result['backend']}")
        for shape, row in result.get("shapes", {}).items():
            where = result.get("device", "the CPU kernel")
            for key in ("recurrence_over_kernel", "share_of_gemm_rate", "milliseconds_a_block", "times_the_kernel"):
                if key in row:
                    rows.append(f"| {name} {shape} | {where} | {key} | {json.dumps(row[key])} |")
        for key in (
            "ratio_median_and_quartiles",
            "extra_memory_mib_largest",
            "held_over_plain",
            "plain_over_plain",
            "largest_relative_error",
            "largest_growth_over_plan",
            "mean",
        ):
            if key in result:
                rows.append(f"| {name} | {result['backend']} | {key} | {json.dumps(result[key])} |")
        for series, points in result.get("series", {}).items():
            for point in points:
                place = ", ".join(f"{letter}={point[key]:,}" for letter, key in _LETTERS.items())
                seconds = f"{point['seconds']:.3g}" + (" (extrapolated)" if point["extrapolated"] else "")
                rows.append(f"| {name} with {series}: {place} | the CPU kernel, one core | seconds | {seconds} |")
                for key in ("over_smallest", "over_useful_arithmetic"):
                    rows.append(
                        f"| {name} with {series}: {place} | the CPU kernel, one core | {key} | {point[key]:.3g} |"
                    )
    return rows


if __name__ == "__main__":
    main()
