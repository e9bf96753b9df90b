"""`python -m hub up …` is `fedge hub up …`."""

import sys

from fedge.cli import main

sys.exit(main(["hub", *sys.argv[1:]]))
