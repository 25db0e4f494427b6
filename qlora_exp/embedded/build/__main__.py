"""Rebuild the embedded pair and its task: ``python -m qlora_exp.embedded.build``."""

from qlora_exp.embedded.build.build import main

if __name__ == "__main__":
    main()
