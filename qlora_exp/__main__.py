"""``python -m qlora_exp``: the Hydra application itself; ``-m`` for a multirun."""

import sys

from qlora_exp.hydra_app import main

if __name__ == "__main__":
    sys.exit(main())
