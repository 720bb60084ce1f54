"""`python -m keras_woodfisher.cli`, for where the command itself isn't on the path."""

import sys

from keras_woodfisher.cli import main

sys.exit(main())
