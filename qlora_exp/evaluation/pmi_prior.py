"""What the model says of the options when it is asked about nothing in particular: the prior that PMI divides by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_exp.evaluation.baselines import common_start
from qlora_exp.evaluation.kv_cache import CausalModel, prefill
from qlora_exp.evaluation.likelihood import OptionTrie, Tokens, option_log_likelihoods


def domain_prompt(prompts: Sequence[Tokens]) -> Tokens:
    """The task's prompt without an item: the tokens that all ``prompts`` begin with, then those that all end with."""
    begin = common_start(prompts)
    rest = [prompt[len(begin) :][::-1] for prompt in prompts]
    return begin + common_start(rest)[::-1]


def option_priors(model: CausalModel, prompt: Tokens, trie: OptionTrie) -> np.ndarray:
    """log p(option | prompt) for each option, by one pass over one prompt."""
    next_logits, context = prefill(model, [prompt])
    priors: np.ndarray = option_log_likelihoods(next_logits, context, trie).numpy()[0]
    return priors
