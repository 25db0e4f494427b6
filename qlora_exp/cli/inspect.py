"""``inspect``: how a run's model generates, token by token, next to its base. ``chat``: a conversation with both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import OutputRoot, Run, examples, outputs_of

if TYPE_CHECKING:
    from qlora_exp.inspection.page import Inspection
    from qlora_exp.inspection.sampling import Sampling
    from qlora_exp.inspection.steps import GeneratedToken

OPTIONS_SHOWN = 5
"""Labels in the terminal; ``--json`` and ``--html`` have all."""


def add_to(app: typer.Typer) -> None:
    app.command(
        "inspect",
        epilog=examples(
            "qlora-exp inspect last --item 0",
            "qlora-exp inspect last 'a large wild cat' --top 3",
            "qlora-exp inspect last --item 0 --branch '0= plant' --html item.html",
            "qlora-exp inspect last --item 0 --sample temperature=0.7,top_p=0.9,seed=1",
        ),
    )(inspect_run)
    app.command(
        "chat",
        epilog=examples("qlora-exp chat last", "qlora-exp chat last --only tuned --sample temperature=0.7"),
    )(chat)


def inspect_run(
    run: Run,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="A prompt, instead of --item", show_default=False)
    ] = None,
    item: Annotated[
        str | None, typer.Option(metavar="N", help="A scored item: its number from 0, or its id as test.jsonl:17")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many tokens; default: as in the run's evaluation", min=1)
    ] = None,
    top: Annotated[int, typer.Option(help="Alternatives that are shown for each token", min=1, max=50)] = 3,
    sample: Annotated[
        str | None,
        typer.Option(metavar="SETTINGS", help="Draw tokens, e.g. temperature=0.7,top_p=0.9,top_k=50,seed=1"),
    ] = None,
    branch: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP=TEXT", help="Make the model say TEXT at a step and go on; can be repeated"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an offline page")] = None,
    output_root: OutputRoot = None,
) -> int:
    """Show how a run's model generates an answer: tokens, probabilities, alternatives, next to its base model.

    The model's own probabilities are shown. A sampled token also has those that it was drawn from.
    """
    from qlora_exp.errors import ConfigError, RecordError
    from qlora_exp.records.find import find_run

    if (prompt is None) == (item is None):
        what = "a prompt and an item are given" if prompt is not None else "there is nothing to inspect"
        raise ConfigError(what, "qlora-exp inspect", "give either a PROMPT or --item N, e.g. --item 0")
    sampling, branches = _sampling(sample), dict(map(_branch, branch or ()))
    paths = find_run(run, outputs_of(output_root))
    from qlora_exp.runs.process import silence_libraries

    silence_libraries()
    from qlora_exp.inspection.inspect_run import inspect_prompt

    inspection = inspect_prompt(paths, prompt, item, steps, top, sampling, branches)
    if html is not None:
        from qlora_exp.inspection.page import as_html
        from qlora_exp.records.files import write_text

        try:
            write_text(html, as_html(inspection))
        except OSError as error:
            raise RecordError(f"the page can't be written: {error.strerror}", str(html), "--html FILE") from None
    if as_json:
        from qlora_exp.cli.tables import print_json
        from qlora_exp.inspection.page import as_json as to_json

        print_json(to_json(inspection))
        return 0
    _print(inspection, top)
    if html is not None:
        print(f"page: {html}")
    return 0


CHAT_HELP = """\
/tuned, /base, /both   which models answer
/sample SETTINGS       draw tokens, e.g. /sample temperature=0.7,top_p=0.9; /sample off takes the most likely ones
/system TEXT           the system message; begins a new conversation
/inspect               the tuned model's last answer, token by token
/new                   a new conversation
/save FILE             the conversation as JSON
/help, /quit"""


def chat(
    run: Run,
    only: Annotated[str | None, typer.Option(metavar="MODEL", help="Only one model answers: tuned or base")] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many tokens an answer; default: as in the run's evaluation", min=1)
    ] = None,
    sample: Annotated[
        str | None, typer.Option(metavar="SETTINGS", help="Draw tokens, e.g. temperature=0.7,top_p=0.9,seed=1")
    ] = None,
    output_root: OutputRoot = None,
) -> int:
    """Talk to a run's model and its base, in the run's chat template or plain format.

    Messages are read from standard input, one a line; /help lists the commands. Each model continues its own answers.
    """
    import io
    import sys

    from qlora_exp.errors import ConfigError, QloraExpError, nearest
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    if only not in (None, "tuned", "base"):
        raise ConfigError(f"there is no model {only!r}", f"--only {only}", nearest(only or "", ("tuned", "base")))
    sampling, paths = _sampling(sample), find_run(run, outputs_of(output_root))
    from qlora_exp.runs.process import silence_libraries

    silence_libraries()
    from qlora_exp.export.tuned_model import load_tuned_model
    from qlora_exp.inspection.chat import Conversation
    from qlora_exp.inspection.sampling import Sampling
    from qlora_exp.runs.entry_points import config_from_plain

    record = read_record(paths.record)
    model, tokenizer = load_tuned_model(record, paths, "auto")
    talk = Conversation(model, tokenizer, config_from_plain(record.config), record, steps, sampling or Sampling())
    sides = [only] if only else ["tuned", "base"]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not talk.is_chat:
        print("The run's format is plain: each message is a prompt by itself.")
    print("/help lists the commands; an empty line is ignored.")
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        message = line.rstrip("\n")
        if not line or message.strip() in ("/quit", "/exit"):
            print()
            return 0
        try:
            if message.startswith("/"):
                sides = _command(message, talk, sides)
            elif message.strip():
                for side in sides:
                    print(f"{side}: ", end="", flush=True)
                    talk.answer(message, side, lambda text: print(text, end="", flush=True))
                    print()
        except QloraExpError as error:
            print(f"\nerror: {error}", flush=True)


def _command(message: str, talk: Any, sides: list[str]) -> list[str]:
    """Carry out a command of the conversation, and return which models answer from now on."""
    from qlora_exp.errors import ConfigError, nearest
    from qlora_exp.inspection.sampling import Sampling
    from qlora_exp.records.files import write_json

    name, _, rest = message.strip().partition(" ")
    if name in ("/tuned", "/base", "/both"):
        return [name[1:]] if name != "/both" else ["tuned", "base"]
    if name == "/sample":
        talk.sampling = Sampling() if rest in ("", "off") else _sampling(rest) or Sampling()
    elif name == "/system":
        talk.system = rest or None
        talk.forget()
    elif name == "/new":
        talk.forget()
    elif name == "/inspect":
        _print_steps(talk.last_steps, 3)
    elif name == "/save":
        if not rest:
            raise ConfigError("there is no file to save to", name, "/save FILE")
        turns = {side: [{"role": role, "content": text} for role, text in talk.turns[side]] for side in talk.turns}
        try:
            write_json(Path(rest), {"run_id": talk.record.run_id, "system": talk.system, **turns})
        except OSError as error:
            raise ConfigError(f"the file can't be written: {error.strerror}", rest, "/save FILE") from None
    elif name == "/help":
        print(CHAT_HELP)
    else:
        names = ("/tuned", "/base", "/both", "/sample", "/system", "/inspect", "/new", "/save", "/help", "/quit")
        raise ConfigError(f"there is no command {name}", message, nearest(name, names))
    return sides


def _sampling(text: str | None) -> Sampling | None:
    from dataclasses import fields

    from qlora_exp.errors import ConfigError, nearest

    if text is None:
        return None
    from qlora_exp.inspection.sampling import Sampling

    kinds: dict[str, Any] = {"temperature": float, "top_p": float, "top_k": int, "seed": int}
    values: dict[str, Any] = {"temperature": 1.0}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key.strip() not in kinds:
            names = [field.name for field in fields(Sampling)]
            raise ConfigError(
                f"sampling has no setting {key.strip()!r}", f"--sample {text}", nearest(key.strip(), names)
            )
        try:
            values[key.strip()] = kinds[key.strip()](value)
        except ValueError:
            raise ConfigError(f"{value!r} is no number", f"--sample {text}", f"e.g. {key.strip()}=1") from None
    if not values["temperature"] > 0 or not 0 < values.get("top_p", 1.0) <= 1 or values.get("top_k", 1) < 1:
        hint = "temperature above 0, top_p above 0 and up to 1, top_k of at least 1"
        raise ConfigError("these settings draw nothing", f"--sample {text}", hint)
    return Sampling(**values)


def _branch(text: str) -> tuple[int, str]:
    from qlora_exp.errors import ConfigError

    step, sign, forced = text.partition("=")
    if not sign or not step.strip().isdecimal():
        raise ConfigError("a branch is a step and a text", f"--branch {text}", "e.g. --branch '0= plant'")
    return int(step), forced


def _print(inspection: Inspection, top: int) -> None:
    from qlora_exp.formatting import plain_table, print_table
    from qlora_exp.inspection.page import option_line

    print(inspection.prompt)
    print(f"({len(inspection.prompt_tokens)} tokens; · is a space, ⏎ a line break)\n")
    _print_steps(inspection.steps, top)
    print(f"\ntuned:        {inspection.answer.strip()}\nbase:         {inspection.base_answer.strip()}")
    if inspection.expected is not None:
        print(f"right answer: {inspection.expected}")
    if inspection.options:
        print()
        lines = option_line(inspection.options, inspection.expected, OPTIONS_SHOWN)
        marks = ["← right" if one.label == inspection.expected else "" for one in lines]
        cells = [
            (one.label, f"{one.tuned:.3f}", f"{one.base:.3f}", mark) for one, mark in zip(lines, marks, strict=True)
        ]
        print_table(plain_table((f"label (of {len(inspection.options)})", "p tuned", "p base", ""), cells))


def _print_steps(steps: Sequence[GeneratedToken], shown: int) -> None:
    from qlora_exp.formatting import plain_table, print_table
    from qlora_exp.inspection.page import visible_token

    headings = ("", "token", "tuned", "base", "base rank", "entropy", "KL", "tuned, or", "base says")
    rows = [(str(number), *_cells(step, shown)) for number, step in enumerate(steps)]
    print_table(plain_table(headings, rows))
    for number, step in enumerate(steps):
        if step.drawn_from is not None:
            drawn = ", ".join(f"{visible_token(one.text)} {one.probability:.3f}" for one in step.drawn_from)
            print(f"step {number} was drawn from {step.drawn_candidates} tokens: {drawn}")


def _cells(step: GeneratedToken, shown: int) -> tuple[str, ...]:
    """Return a step's cells: of the tuned model the other likely tokens, of the base its most likely ones."""
    from qlora_exp.inspection.page import visible_token

    others = [one for one in step.top_tuned if one.token_id != step.token_id][: shown - 1]
    tops = [
        "  ".join(f"{visible_token(one.text)} {one.probability:.2f}" for one in alternatives)
        for alternatives in (others, step.top_base[: max(1, shown - 2)])
    ]
    text = visible_token(step.text) + (" (forced)" if step.forced else "")
    return (
        *(text, f"{step.probability_tuned:.3f}", f"{step.probability_base:.3f}", str(step.rank_base)),
        *(f"{step.entropy_tuned:.2f}", f"{step.divergence:.2f}", *tops),
    )
