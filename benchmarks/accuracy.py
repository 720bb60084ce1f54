"""Accuracy of one-shot pruning: each method and preset, with its seconds and gradients, over seeds.

Nothing is chosen by --val. What a run measures is added to what `results/accuracy_BACKEND.json` has for the same model
and data, so that a long table can be made in parts; the table is printed and written beside it in Markdown. Published
figures are quoted: CHITA (Benbaki et al. 2023, arXiv 2302.14623, ResNet-20 on CIFAR-10, dense 91.36 %), best of its
single-stage results.
"""

import json
import time

import keras
import numpy as np
from common import RESULTS, accuracy, load, parser
from nets import augmented

import keras_woodfisher as kw

METHODS = {
    "magnitude": {"method": "magnitude"},
    "independent": {"quality": "fast", "update": "independent"},
    "joint": {"quality": "fast", "update": "joint"},
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced", "method": "woodfisher"},
    "best": {"quality": "best", "method": "woodfisher"},
    "reconstruct": {"quality": "balanced"},
    "reconstruct best": {"quality": "best"},
}
PUBLISHED = {"CHITA, as published": {"0.5": 90.60, "0.6": 89.22, "0.7": 84.12, "0.8": 57.90, "0.9": 15.60}}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    args.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args.add_argument("--seed", type=int, nargs="+", help="these seeds instead of the first --seeds")
    args.add_argument("--augment", action="store_true", help="data of cropped and flipped images, anew at each pass")
    args.add_argument("--set", nargs="+", default=[], help="options of prune, NAME=VALUE, for what is measured now")
    args.add_argument("--name", default="accuracy")
    args = args.parse_args()
    model, train, val = load(args)
    dense = model.get_weights()
    path = RESULTS / f"{args.name}_{keras.backend.backend()}.json"
    RESULTS.mkdir(exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    options = {name: json.loads(value) for name, value in (text.split("=") for text in args.set)}
    for method in args.methods:
        for seed in args.seed or range(1 if method == "magnitude" else args.seeds):
            for sparsity in args.sparsity:
                model.set_weights(dense)
                data = _fresh(train, seed) if args.augment else train
                start = time.perf_counter()
                report = kw.prune(model, data, sparsity, seed=seed, verbose=0, **METHODS[method], **options)
                seconds = time.perf_counter() - start
                row = {"method": method, "sparsity": sparsity, "seed": seed, "augment": args.augment, **options}
                rows = [r for r in rows if any(r.get(key) != value for key, value in row.items())]
                examples = report.samples * report.settings.get("grad_batch_size", 0)
                if report.reconstruction is not None and report.reconstruction.refined is not None:
                    examples = report.reconstruction.refined.examples
                examples += sum(stage.calibration.examples for stage in report.stages if stage.calibration)
                row |= {"accuracy": accuracy(model, val), "seconds": seconds, "gradients": report.samples}
                rows.append(row | {"examples": examples})
                print(rows[-1], flush=True)
                result = {"backend": keras.backend.backend(), "rows": rows}
                path.write_text(json.dumps(result, indent=1) + "\n")
    model.set_weights(dense)
    table = _table(rows, accuracy(model, val), PUBLISHED if args.model else {})
    path.with_suffix(".md").write_text(table + "\n")
    print(table)


def _fresh(train: tuple, seed: int) -> object:
    """A stream of batches whose images are cropped and flipped anew at each pass."""
    passes = iter(range(10**6))

    def batches() -> object:
        number = next(passes)
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(len(train[0]))
        x = augmented(train[0][order], int(rng.integers(2**31)))
        return ((x[i : i + 512], train[1][order[i : i + 512]]) for i in range(0, len(x), 512))

    return batches


def _table(rows: list[dict], dense: float, published: dict[str, dict[str, float]]) -> str:
    """Mean and extremes of the accuracy over the seeds; the median of the seconds."""
    levels = sorted({row["sparsity"] for row in rows})
    lines = [f"Dense: {dense:.2f} %", "", "| | " + " | ".join(f"{s:g}" for s in levels) + " | seconds | gradients |"]
    lines.append("|---" * (len(levels) + 3) + "|")
    kinds = list(dict.fromkeys((row["method"], row["augment"]) for row in rows))
    for method, augment in kinds:
        chosen = [row for row in rows if (row["method"], row["augment"]) == (method, augment)]
        cells = []
        for sparsity in levels:
            found = [row["accuracy"] for row in chosen if row["sparsity"] == sparsity]
            spread = f" ({min(found):.1f}-{max(found):.1f})" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.2f}{spread}" if found else "")
        # The median, since other work on the machine can make one run take many times as long.
        seconds, gradients = (np.median([row[key] for row in chosen]) for key in ("seconds", "gradients"))
        name = f"{method}, augmented data" if augment else method
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.1f} | {gradients:,.0f} |")
    for name, figures in published.items():
        cells = " | ".join(str(figures.get(f"{s:g}", "")) for s in levels)
        lines.append(f"| {name} | {cells} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
