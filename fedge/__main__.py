"""`python -m fedge`: the same as the command `fedge`, for where the scripts' folder is not on PATH."""

import sys

from fedge.cli import main

sys.exit(main())
