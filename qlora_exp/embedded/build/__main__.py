"""``python -m qlora_exp.embedded.build``: the embedded pair and its task, made again."""

from qlora_exp.embedded.build.build import main

if __name__ == "__main__":
    main()
