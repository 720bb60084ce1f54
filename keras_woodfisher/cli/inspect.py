"""`keras-woodfisher inspect`: the zeros of a model, and the bytes that formats for sparse weights would take."""

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import keras_woodfisher as kw
from keras_woodfisher.cli import files
from keras_woodfisher.cli.answer import Answer, table
from keras_woodfisher.model.targets import ALL_PRUNABLE, Target, all_targets, named_targets
from keras_woodfisher.reports.pruning_report import PruningReport
from keras_woodfisher.reports.storage import Storage, target_storage

_HEADER = ("variable", "shape", "weights", "pruned", "sparsity", "dense", "bitmask", "CSR", "gzip")


def run(args: Namespace) -> Answer:
    """Lists the prunable variables of `args.model`, which needn't be compiled."""
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
