"""``python -m qlora_exp.cli``: the commands, for environments where the console script is not installed."""

import sys

from qlora_exp.cli import main

if __name__ == "__main__":
    sys.exit(main())
