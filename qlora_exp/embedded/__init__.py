"""The embedded base/instruct pair and its task: small enough to live in the package, real enough to be measured on.

`python -m qlora_exp.embedded.build` rebuilds everything in this folder from WordNet 3.0; MODEL_CARD.md says what came
out.
"""
