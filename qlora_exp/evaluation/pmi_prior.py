"""The options' prior probabilities for PMI scoring: their likelihood after the task's prompt without an item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_exp.evaluation.baselines import common_prefix
from qlora_exp.evaluation.kv_cache import CausalModel, prefill
from qlora_exp.evaluation.likelihood import OptionTrie, Tokens, option_log_likelihoods


def domain_prompt(prompts: Sequence[Tokens]) -> Tokens:
    """Return the task's prompt without an item: the common beginning of all ``prompts``, then their common end."""
    prefix = common_prefix(prompts)
    reversed_rests = [prompt[len(prefix) :][::-1] for prompt in prompts]
    return prefix + common_prefix(reversed_rests)[::-1]


def option_priors(model: CausalModel, prompt: Tokens, trie: OptionTrie) -> np.ndarray:
    """Return log p(option | prompt) for each option, from one prefill of ``prompt``."""
    next_logits, context = prefill(model, [prompt])
    priors: np.ndarray = option_log_likelihoods(next_logits, context, trie).numpy()[0]
    return priors
