"""``python -m qlora_exp OVERRIDES``: the Hydra application; with ``-m`` a multirun."""

import sys

from qlora_exp.system import heap

if __name__ == "__main__":
    heap.reexec_with_tunables(sys.argv[1:])
    from qlora_exp.orchestration.hydra_app import main

    sys.exit(main())
