"""One run in a process of its own: reads a resolved configuration from standard input. Started by a multirun."""

from __future__ import annotations

import sys

import yaml

from qlora_exp.app import EXIT_INTERRUPTED, EXIT_WRONG_INPUT, config_from_plain, execute, exit_code_of, summary, tell
from qlora_exp.errors import QloraExpError
from qlora_exp.progress import Progress


def main() -> int:
    try:
        config = config_from_plain(yaml.safe_load(sys.stdin.read()))
        with Progress() as observer:
            record = execute(config, observer)
    except QloraExpError as error:
        tell(error)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(summary(record, config))
    return exit_code_of(record.status)


if __name__ == "__main__":
    sys.exit(main())
