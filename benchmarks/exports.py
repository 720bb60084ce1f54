"""Bytes, accuracy and time of a dense and a reconstructed net in each format that the backend exports to.

Needs the extras (`make test-exports` makes an environment with them: .venv-exports).
"""

import gzip
import tempfile
from importlib.metadata import version
from pathlib import Path

import keras
from common import load, parser, record

import keras_woodfisher as kw
from keras_woodfisher.deployment.exporting.formats import FORMATS

RUNTIMES = ("onnx", "onnxruntime", "ai-edge-litert", "openvino", "tensorflow")
WAYS = {
    "onnx": [{"sparse": False}, {"sparse": True}],
    "litert": [{"sparse": False}, {"sparse": True}, {"sparse": False, "quantize": "int8"}, {"quantize": "int8"}],
    "openvino": [{}],
    "tf_saved_model": [{}],
}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, default=0.8)
    args.add_argument("--examples", type=int, default=1000, help="of --val, that outputs and accuracy are compared on")
    args.add_argument("--name", default="cnn", help="of the result")
    args = args.parse_args()
    model, (x, _), (x_val, y_val) = load(args)
    held_out = x_val[: args.examples], y_val[: args.examples]
    with tempfile.TemporaryDirectory() as folder:
        dense = keras.models.clone_model(model)
        dense.set_weights(model.get_weights())
        rows = keras_files(dense, Path(folder), "dense")
        report = kw.prune(model, x, args.sparsity, verbose=0)
        rows |= keras_files(model, Path(folder), "pruned")
        for name, ways in WAYS.items():
            if keras.backend.backend() in FORMATS[name].backends:
                rows |= exported(dense, model, held_out, Path(folder), (name, ways))
    outcome = {"sparsity": report.sparsity, "examples": len(held_out[0]), "files": rows}
    record(f"exports_{args.name}", {"versions": {name: version(name) for name in RUNTIMES}, **outcome})
    print(table(rows))


def keras_files(model: keras.Model, folder: Path, which: str) -> dict:
    """Keras's own file, and the deflated one."""
    model.save(folder / f"{which}.keras")
    kw.save(model, folder / f"{which}.small.keras")
    sizes = {kind: (folder / f"{which}{kind}.keras").read_bytes() for kind in ("", ".small")}
    named = {"": f".keras, {which}", ".small": f".keras by kw.save, {which}"}
    return {named[kind]: {"bytes": len(data), "gzip": len(gzip.compress(data, 6))} for kind, data in sizes.items()}


def exported(dense: keras.Model, model: keras.Model, held_out: tuple, folder: Path, format: tuple) -> dict:
    """The dense model's file, and each way to write the pruned one's."""
    name, ways = format
    rows = {}
    for quantize in sorted({way.get("quantize", "") for way in ways}):
        path = folder / f"dense{quantize}{FORMATS[name].ending}"
        full = kw.export(dense, path, *held_out, quantize=quantize or None)
        rows[f"{name} {quantize}".strip() + ", dense"] = row(full)
        for way in [way for way in ways if way.get("quantize", "") == quantize]:
            target = folder / f"pruned{quantize}{FORMATS[name].ending}"
            report = kw.export(model, target, *held_out, dense=path, **way)
            sparse = ", zeros left out" if report.file.sparse_tensors else ""
            rows[f"{name} {quantize}".strip() + f", pruned{sparse}"] = row(report)
    return rows


def row(report: kw.ExportReport) -> dict:
    """What the table has of a file."""
    return {
        "bytes": report.file.bytes,
        "gzip": report.file.gzip_bytes,
        "sparsity": report.file.zeros / report.file.weights,
        "sparse_tensors": report.file.sparse_tensors,
        "accuracy": report.file.accuracy,
        "keras_accuracy": report.keras_accuracy,
        "agreement": report.agreement,
        "difference": report.difference,
        "time": report.latency_ratio,
        "notes": list(report.notes),
    }


def table(rows: dict) -> str:
    """Markdown."""
    lines = ["| file | bytes | gzip -6 | accuracy | same class as Keras | time / dense |", "|---|---|---|---|---|---|"]
    for name, found in rows.items():
        cells = [f"{found['bytes']:,}", f"{found['gzip']:,}"]
        cells += [f"{100 * found[key]:.2f}" if found.get(key) is not None else "" for key in ("accuracy", "agreement")]
        cells.append(f"{found['time']:.2f}" if found.get("time") else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
