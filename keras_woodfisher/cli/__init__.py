"""The command line `keras-woodfisher`: one module a command.

Standard output holds the answer of a command and nothing else; progress, warnings and errors go to standard error.
"""

from keras_woodfisher.cli.main import main

__all__ = ["main"]
