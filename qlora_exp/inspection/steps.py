"""Generation token by token: what the tuned model and its base would have said at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from qlora_exp.errors import ConfigError, ModelError
from qlora_exp.evaluation.kv_cache import CausalModel, prefill, scoring_mode, start_token
from qlora_exp.evaluation.likelihood import OptionTrie, option_log_likelihoods
from qlora_exp.inspection.model_pair import ModelPair
from qlora_exp.inspection.prompts import Prompt
from qlora_exp.inspection.sampling import Sampling

INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Ends a decoded text whose last character isn't complete."""


@dataclass(frozen=True)
class Alternative:
    """One token and its probability."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token. Probabilities are the models' own, before temperature and limits. What needs the base is
    ``None``, and ``top_base`` empty, if the base isn't known.

    ``rank_tuned``, ``rank_base``: 1 is the most likely token. Entropies and ``divergence`` (Kullback-Leibler, of the
    base from the tuned model) are in nats. ``drawn_from``: what a sampled token was drawn from, after temperature and
    limits; ``None``: it wasn't sampled. ``forced``: the user chose it.
    """

    token_id: int
    text: str
    probability_tuned: float
    probability_base: float | None
    rank_tuned: int
    rank_base: int | None
    entropy_tuned: float
    entropy_base: float | None
    divergence: float | None
    top_tuned: tuple[Alternative, ...]
    top_base: tuple[Alternative, ...]
    drawn_from: tuple[Alternative, ...] | None = None
    drawn_candidates: int | None = None
    """Tokens that could have been drawn."""
    drawn_probability: float | None = None
    """With which this token was drawn."""
    forced: bool = False
    ends: bool = False
    """The token ends the answer."""


@dataclass(frozen=True)
class OptionScore:
    """One label of a classification: its probability among the labels, by the tuned model and its base (``None``: it
    isn't known)."""

    label: str
    tuned: float
    base: float | None


@torch.no_grad()
def generate_steps(
    models: ModelPair,
    tokenizer: Any,
    prompt: Prompt,
    *,
    steps: int | None = None,
    top: int = 5,
    sampling: Sampling | None = None,
    branches: Mapping[int, str] | None = None,
    on_text: Callable[[str], None] = lambda _: None,
) -> list[GeneratedToken]:
    """Generate an answer to ``prompt`` with the tuned model, and record each step.

    Args:
        models: the tuned model generates; its base says what it thinks of each token.
        steps: at most so many tokens; ``None``: as many as the run's evaluation allows.
        branches: step (from 0) → text that the model is made to say there; it goes on from it.
        on_text: is called with each new piece of the answer.

    Raises:
        ConfigError: a branch is beyond the last step. ModelError: the prompt fills the model's context.
    """
    sampling = sampling or Sampling()
    limit = steps if steps is not None else prompt.stop.max_new_tokens
    with scoring_mode(models.tuned):
        causal = CausalModel(models.tuned)
        start = prompt.ids or (start_token(tokenizer),)
        if causal.max_positions is not None:
            limit = min(limit, causal.max_positions - len(start) + 1)
        if limit < 1:
            what = f"the prompt has {len(start)} tokens, and the model reads at most {causal.max_positions}"
            raise ModelError(what, "PROMPT", "a shorter prompt")
        forced = _forced_tokens(branches or {}, tokenizer, limit)
        chosen, tuned, drawn = _generate(causal, tokenizer, start, prompt, limit, sampling, forced, on_text)
    base = _base_log_probabilities(models, start, chosen)
    results = []
    for number, token in enumerate(chosen):
        ours, theirs, draw = tuned[number], base[number] if base is not None else None, drawn[number]
        results.append(
            GeneratedToken(
                token_id=token,
                text=shown_token(token, tokenizer),
                probability_tuned=math.exp(float(ours[token])),
                probability_base=None if theirs is None else math.exp(float(theirs[token])),
                rank_tuned=int((ours > ours[token]).sum()) + 1,
                rank_base=None if theirs is None else int((theirs > theirs[token]).sum()) + 1,
                entropy_tuned=_entropy(ours),
                entropy_base=None if theirs is None else _entropy(theirs),
                divergence=None if theirs is None else float((ours.exp() * (ours - theirs)).nansum()),
                top_tuned=_alternatives(ours.exp(), tokenizer, top),
                top_base=() if theirs is None else _alternatives(theirs.exp(), tokenizer, top),
                drawn_from=_alternatives(draw, tokenizer, top) if draw is not None else None,
                drawn_candidates=int((draw > 0).sum()) if draw is not None else None,
                drawn_probability=float(draw[token]) if draw is not None else None,
                forced=number in forced,
                ends=token in prompt.stop.token_ids,
            )
        )
    return results


def answer_of(steps: Sequence[GeneratedToken], tokenizer: Any) -> str:
    """Return the generated text, without the token that ends it."""
    text: str = tokenizer.decode([step.token_id for step in steps if not step.ends])
    return text


@torch.no_grad()
def option_scores(models: ModelPair, tokenizer: Any, prompt: Prompt) -> list[OptionScore]:
    """Return the labels' probabilities, each relative to all labels, the tuned model's most likely one first."""
    options = prompt.options or {}
    trie = OptionTrie.of(list(options.values()))

    def probabilities(model: Any) -> list[float]:
        with scoring_mode(model):
            logits, context = prefill(CausalModel(model), [prompt.ids or (start_token(tokenizer),)])
            return [float(p) for p in option_log_likelihoods(logits, context, trie)[0].softmax(dim=-1)]

    tuned = probabilities(models.tuned)
    base: list[float | None] = [None] * len(options)
    if models.has_base:
        with models.as_base() as model:
            base = [*probabilities(model)]
    scores = [OptionScore(label, a, b) for label, a, b in zip(options, tuned, base, strict=True)]
    return sorted(scores, key=lambda score: -score.tuned)


def _generate(
    causal: CausalModel,
    tokenizer: Any,
    start: Sequence[int],
    prompt: Prompt,
    limit: int,
    sampling: Sampling,
    forced: Mapping[int, int],
    on_text: Callable[[str], None],
) -> tuple[list[int], list[Tensor], list[Tensor | None]]:
    """Return the tokens; before each of them the tuned model's log-probabilities, and what it was drawn from."""
    generator = torch.Generator().manual_seed(sampling.seed)
    logits, context = prefill(causal, [list(start)])
    shown = 0
    chosen: list[int] = []
    tuned: list[Tensor] = []
    drawn: list[Tensor | None] = []
    while len(chosen) < limit:
        scores = logits[0].cpu()
        tuned.append(log_softmax(scores, dim=-1))
        drawn.append(None)
        if len(chosen) in forced:
            token = forced[len(chosen)]
        elif sampling.temperature > 0:
            probabilities = _limited(scores, sampling)
            drawn[-1] = probabilities
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        else:
            token = int(scores.argmax())
        chosen.append(token)
        if token not in prompt.stop.token_ids:
            # A token may be a part of a character, so the whole text is decoded each time.
            text = tokenizer.decode(chosen)
            if not text.endswith(INCOMPLETE_CHARACTER):
                on_text(text[shown:])
                shown = len(text)
        ended = token in prompt.stop.token_ids or (prompt.stop.at_newline and "\n" in tokenizer.decode(chosen).lstrip())
        if len(chosen) == limit or (ended and max(forced, default=-1) < len(chosen)):
            break
        ids = torch.tensor([[token]], device=context.ids.device)
        extended, context = context.extend(ids, torch.ones_like(ids))
        logits = extended[:, -1]
    return chosen, tuned, drawn


def _base_log_probabilities(models: ModelPair, start: Sequence[int], chosen: Sequence[int]) -> list[Tensor] | None:
    """Return what the base would have said before each of the ``chosen`` tokens, in one pass; ``None``: it isn't
    known."""
    if not models.has_base:
        return None
    with models.as_base() as model, scoring_mode(model):
        causal = CausalModel(model)
        ids = torch.tensor([[*start, *chosen[:-1]]], device=causal.device)
        logits, _ = causal(ids, torch.ones_like(ids), keep=len(chosen), cache=None, use_cache=False)
    return list(log_softmax(logits[0].cpu(), dim=-1))


def _limited(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities after temperature, top-k and top-p, as transformers applies them, in this order."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    limited: Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0]
    return limited.softmax(dim=-1)


def _forced_tokens(branches: Mapping[int, str], tokenizer: Any, limit: int) -> dict[int, int]:
    forced: dict[int, int] = {}
    for step, text in branches.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not 0 <= step < limit or not ids:
            what = f"there is no step {step}" if ids else f"{text!r} is no token"
            raise ConfigError(what, f"--branch {step}={text}", f"STEP=TEXT, steps 0 to {limit - 1}; more with --steps")
        forced |= {step + place: token for place, token in enumerate(ids) if step + place < limit}
    return forced


def _alternatives(probabilities: Tensor, tokenizer: Any, top: int) -> tuple[Alternative, ...]:
    values, ids = probabilities.topk(min(top, len(probabilities)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(Alternative(token, shown_token(token, tokenizer), value) for token, value in pairs if value > 0)


def shown_token(token: int, tokenizer: Any) -> str:
    """Return a token's text, special tokens by name. A token may be a part of a character: then its raw form."""
    text: str = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if INCOMPLETE_CHARACTER in text or not text else text


def _entropy(log_probabilities: Tensor) -> float:
    return float(-(log_probabilities.exp() * log_probabilities).nansum())
