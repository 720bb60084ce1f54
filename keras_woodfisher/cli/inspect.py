"""`keras-woodfisher inspect`: the zeros of a model or of an exported file, and the bytes that they take or would."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras_woodfisher as kw
from keras_woodfisher.cli import files
from keras_woodfisher.cli.answer import Answer, table
from keras_woodfisher.cli.paths import check_input
from keras_woodfisher.deployment.exporting.formats import FORMATS, check_installed
from keras_woodfisher.deployment.exporting.tensors import FileTensor, bytes_of, files_of
from keras_woodfisher.model.targets import ALL_PRUNABLE, Target, all_targets, named_targets
from keras_woodfisher.reports.pruning_report import PruningReport
from keras_woodfisher.reports.storage import Storage, target_storage

_HEADER = ("variable", "shape", "weights", "pruned", "sparsity", "dense", "bitmask", "CSR", "gzip")
_FILE_HEADER = ("tensor", "shape", "kept as", "weights", "zeros", "sparsity", "bytes", "zeros are")


def run(args: Namespace) -> Answer:
    """Lists the prunable variables of `args.model`, which needn't be compiled, or the weights of an exported file."""
    exported = {entry.ending: name for name, entry in FORMATS.items() if entry.ending}
    if name := exported.get(Path(args.model).suffix):
        return _of_file(args.model, name)
    model = files.load_model(args.model, compile=False)
    report = kw.sparsity_report(model)
    sizes = [target_storage(target) for target in _counted(named_targets(all_targets(model), ALL_PRUNABLE), report)]
    total = sum(sizes, Storage(0, 0, 0, 0))
    document = report.as_dict()
    rows = [row | {"bytes": asdict(size)} for row, size in zip(document["variables"], sizes, strict=True)]
    names = ("weights", "pruned", "sparsity", "overall_sparsity", "zeroed", "left_out", "notes")
    figures = {name: document[name] for name in names}
    document = {"command": "inspect", "model": args.model, "variables": rows, **figures, "bytes": asdict(total)}
    return Answer("\n".join([_table(report, sizes, total), *report.remarks()]), document)


def _of_file(path: str, name: str) -> Answer:
    """The constants of an exported file with two axes or more."""
    wanted = FORMATS[name]
    check_input(path, (wanted.ending,))
    check_installed([(package, wanted.extra) for package in wanted.packages], f"Reading {path}")
    try:
        tensors = wanted.handler.tensors(path)
    except Exception as error:
        raise ValueError(f"{path} can't be read as {name}: it is damaged, or something else ({error}).") from error
    size, compressed = bytes_of(files_of(Path(path)))
    rows = [(t.name, str(t.shape), t.dtype, *_figures(t.weights, t.zeros, t.bytes), _kept(t)) for t in tensors]
    weights, zeros = sum(t.weights for t in tensors), sum(t.zeros for t in tensors)
    total = ("total", "", "", *_figures(weights, zeros, sum(t.bytes for t in tensors)), "")
    text = f"{table(_FILE_HEADER, rows, total, left=3)}\nthe file: {size:,} bytes, {compressed:,} after gzip"
    document = {"command": "inspect", "model": path, "format": name, "file_bytes": size, "gzip_bytes": compressed}
    rows_as_data = [asdict(t) | {"weights": t.weights} for t in tensors]
    return Answer(text, document | {"tensors": rows_as_data, "weights": weights, "zeros": zeros})


def _figures(weights: int, zeros: int, size: int) -> tuple[str, ...]:
    return f"{weights:,}", f"{zeros:,}", f"{zeros / weights:.4f}" if weights else "", f"{size:,}"


def _kept(tensor: FileTensor) -> str:
    return "sparse" if tensor.sparse else "in full"


def _counted(targets: list[Target], report: PruningReport) -> list[Target]:
    """Those that the report counts, which leaves out what can't be read; the order is the same."""
    rest = iter(targets)
    return [next(t for t in rest if t.name == v.name) for v in report.variables]


def _table(report: PruningReport, sizes: list[Storage], total: Storage) -> str:
    rows = [(v.name, str(v.shape), *_cells(v, size)) for v, size in zip(report.variables, sizes, strict=True)]
    return table(_HEADER, rows, ("total", "", *_cells(report, total)), left=2)


def _cells(found: Any, size: Storage) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (size.dense, size.bitmask, size.csr, size.gzip))
    return (f"{found.weights:,}", f"{found.pruned:,}", f"{found.sparsity:.4f}", *counts)
