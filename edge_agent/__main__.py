"""`python -m edge_agent run …` is `fedge agent run …`."""

import sys

from fedge.cli import main

sys.exit(main(["agent", *sys.argv[1:]]))
