"""`python -m fxsparse`: the command line."""

import sys

from fxsparse.cli import main

sys.exit(main())
