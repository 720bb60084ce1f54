"""`keras-woodfisher compress`: the same `.keras` file, deflated; the model isn't loaded."""

import zipfile
import zlib
from argparse import Namespace

from keras_woodfisher.cli import files, paths
from keras_woodfisher.cli.answer import Answer
from keras_woodfisher.deployment.saving.archive import deflate, sizes_of
from keras_woodfisher.deployment.whole_files import write_whole
from keras_woodfisher.options.sizes import size_text

_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


def run(args: Namespace) -> Answer:
    """Rewrites `args.model` as `args.out`."""
    before = paths.size_of(args.model)
    files.check_archive(args.model)
    paths.check_output(args.out, (".keras",), args.force, before)
    try:
        write_whole(args.out, lambda path: deflate(args.model, path))
    except _DAMAGED as error:
        raise ValueError(f"{args.model} is damaged ({error}). Save the model anew, or copy the file again.") from None
    after, unpacked = sizes_of(args.out)
    text = f"Wrote {args.out}: {size_text(after)}, {after / before:.1%} of the {size_text(before)} of {args.model}."
    sizes = {"bytes": before, "out_bytes": after, "unpacked_bytes": unpacked}
    return Answer(text, {"command": "compress", "model": args.model, "out": args.out, **sizes})
