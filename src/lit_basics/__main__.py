"""``python -m lit_basics``: the command line, which sees modules in the working directory too."""

import sys

from lit_basics.cli import main

if __name__ == "__main__":
    sys.exit(main())
