"""A conversation with a run's model: each message is answered by the tuned model and by its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from qlora_exp.evaluation.generation import StopRule
from qlora_exp.inspection.model_pair import ModelPair
from qlora_exp.inspection.prompts import own_prompt
from qlora_exp.inspection.sampling import Sampling
from qlora_exp.inspection.steps import GeneratedToken, answer_of, generate_steps
from qlora_exp.inspection.subject import Subject

Messages = list[tuple[str, str]]


@dataclass
class Conversation:
    """Two conversations with the same user: each model continues its answers, not the other's.

    In the plain format there is no conversation: each message is a prompt by itself. Each sampled answer has a seed of
    its number, so a conversation can be repeated, and its answers differ.
    """

    models: ModelPair
    subject: Subject
    steps: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    turns: dict[str, Messages] = field(default_factory=lambda: {"tuned": [], "base": []})
    stop: StopRule | None = None
    """When an answer ends. The first message reads it from the task's data."""
    last_steps: list[GeneratedToken] = field(default_factory=list)
    """Of the tuned model's last answer."""

    @property
    def is_chat(self) -> bool:
        """Whether the run's format has turns."""
        return self.subject.format == "chat"

    @property
    def sides(self) -> list[str]:
        """Which models can answer."""
        return ["tuned", "base"] if self.models.has_base else ["tuned"]

    def answer(self, message: str, side: str, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Return the answer of ``side`` (``tuned`` or ``base``), and add both messages to its conversation.

        ``on_text`` is called with each new piece of the answer.

        Raises:
            DataError, ModelError: the template can't write the conversation, or it is too long. Nothing is added then.
        """
        said = self.turns[side]
        earlier = said if self.is_chat else []
        system = [("system", self.system)] if self.system and self.is_chat else []
        turns = [*system, *earlier, ("user", message)]
        tokenizer = self.subject.tokenizer
        prompt = own_prompt(self.subject.config, self.subject.record, tokenizer, turns, self.stop)
        self.stop = prompt.stop
        started, held = False, ""

        def show(text: str) -> None:
            """Leave out white space before and after the answer."""
            nonlocal started, held
            text = held + text if started else text.lstrip()
            started = started or bool(text)
            held = text[len(text.rstrip()) :]
            on_text(text.rstrip())

        sampling = replace(self.sampling, seed=self.sampling.seed + len(said) // 2)

        def steps(models: ModelPair) -> list[GeneratedToken]:
            return generate_steps(models, tokenizer, prompt, steps=self.steps, sampling=sampling, on_text=show)

        if side == "base":
            with self.models.as_base() as base:
                found = steps(ModelPair(base, None))
        else:
            found = self.last_steps = steps(self.models)
        text = answer_of(found, tokenizer).strip()
        self.turns[side] = [*said, ("user", message), ("assistant", text)]
        return text

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns = {"tuned": [], "base": []}
        self.last_steps = []
