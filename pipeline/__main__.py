"""`maskplan`, also as `python -m maskplan.pipeline`."""

import sys

from maskplan.pipeline.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
