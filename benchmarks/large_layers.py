"""Seconds and memory to reconstruct one large Dense layer, and what a whole language model would take by them.

Inputs are made up: correlated, with outliers in a few channels and a spectrum that falls as that of activations does.
"""

import argparse
import resource
import time

import numpy as np
from common import gemm_rate, record
from keras_woodfisher_backends.least_squares.normal_equations import ROWS, NormalEquations

_MODELS = {
    "1 B (22 blocks, width 2048, hidden 5632)": (22, {(2048, 2048): 2, (2048, 256): 2, (2048, 5632): 2, (5632, 2048): 1}),
    "7 B (32 blocks, width 4096, hidden 11008)": (32, {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}),
}
