"""``inspect``: how a model generates, token by token, next to its base. ``chat``: a conversation with both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import OutputRoot, complete_runs, examples, outputs_of

if TYPE_CHECKING:
    from qlora_exp.inspection.chat import Conversation
    from qlora_exp.inspection.page import Inspection
    from qlora_exp.inspection.sampling import Sampling
    from qlora_exp.inspection.steps import GeneratedToken
    from qlora_exp.inspection.subject import Subject

EMPTY = "(nothing: the answer ends at once)"
OPTIONS_SHOWN = 5
"""Labels in the terminal; ``--json`` and ``--html`` have all."""

RunOrFile = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's id, a unique beginning or end of it, 'last', the run's folder, or a GGUF file",
        autocompletion=complete_runs,
        show_default=False,
    ),
]
Gguf = Annotated[
    str | None,
    typer.Option(
        "--gguf",
        metavar="FILE",
        help="A GGUF file in place of the run's own model: a path, 'exported', or the name of an exported one as q8_0",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(
        "inspect",
        epilog=examples(
            "qlora-exp inspect last --item 0",
            "qlora-exp inspect last 'a large wild cat' --top 3",
            "qlora-exp inspect last --item 0 --branch '0= plant' --html item.html",
            "qlora-exp inspect last --item 0 --sample temperature=0.7,top_p=0.9,seed=1",
            "qlora-exp inspect last --item 0 --gguf exported",
            "qlora-exp inspect my_model/model-q4_0.gguf 'a large wild cat'",
        ),
    )(inspect_run)
    app.command(
        "chat",
        epilog=examples(
            "qlora-exp chat last",
            "qlora-exp chat last --only tuned --sample temperature=0.7",
            "qlora-exp chat my_model/model-q4_0.gguf",
        ),
    )(chat)


def inspect_run(
    run: RunOrFile,
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
    gguf: Gguf = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an offline page")] = None,
    output_root: OutputRoot = None,
) -> int:
    """Show how a model generates an answer: tokens, probabilities, alternatives, next to its base model.

    The model is a run's, or a GGUF file. Its own probabilities are shown; a sampled token also has those that it was
    drawn from.
    """
    from qlora_exp.errors import ConfigError

    if (prompt is None) == (item is None):
        what = "a prompt and an item are given" if prompt is not None else "there is nothing to inspect"
        raise ConfigError(what, "qlora-exp inspect", "give either a PROMPT or --item N, e.g. --item 0")
    sampling, branches = _sampling(sample), dict(map(_branch, branch or ()))
    html = html.expanduser() if html is not None else None
    if html is not None:
        _make_folder_of(html, "--html FILE")
    subject = _subject(run, gguf, output_root)
    from qlora_exp.inspection.inspect_run import inspect_prompt

    inspection = inspect_prompt(subject, prompt, item, steps, top, sampling, branches)
    if html is not None:
        from qlora_exp.inspection.page import as_html
        from qlora_exp.records.files import write_text

        try:
            write_text(html, as_html(inspection))
        except OSError as error:
            raise _not_written(html, error.strerror, "--html FILE") from None
    if as_json:
        from qlora_exp.cli.tables import print_json
        from qlora_exp.inspection.page import as_json as to_json

        print_json(to_json(inspection))
        return 0
    _print(inspection, top)
    if html is not None:
        print(f"page: {html}")
    return 0


def _subject(run: str, gguf: str | None, output_root: str | None) -> Subject:
    from qlora_exp.errors import ConfigError

    if gguf is not None and run.lower().endswith(".gguf"):
        raise ConfigError("two GGUF files are given", f"--gguf {gguf}", "RUN --gguf FILE, or the file alone")
    from qlora_exp.runs.process import silence_libraries

    silence_libraries()
    from qlora_exp.inspection.subject import find_subject

    return find_subject(run, gguf, outputs_of(output_root))


def _make_folder_of(file: Path, hint: str) -> None:
    """Make the folder before a model is loaded for the file."""
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(file, error.strerror, hint) from None
    if file.is_dir():
        raise _not_written(file, "it is a folder", hint)


def _not_written(file: Path, why: str | None, hint: str) -> Exception:
    from qlora_exp.errors import RecordError

    return RecordError(f"the file can't be written: {why}", str(file), hint)


CHAT_HELP = """\
/tuned, /base, /both   which models answer
/sample SETTINGS       draw tokens, e.g. /sample temperature=0.7,top_p=0.9; /sample off takes the most likely ones
/system TEXT           the system message; begins a new conversation
/inspect               the tuned model's last answer, token by token
/new                   a new conversation
/save FILE             the conversation as JSON
/help, /quit"""


def chat(
    run: RunOrFile,
    only: Annotated[str | None, typer.Option(metavar="MODEL", help="Only one model answers: tuned or base")] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many tokens an answer; default: as in the run's evaluation", min=1)
    ] = None,
    sample: Annotated[
        str | None, typer.Option(metavar="SETTINGS", help="Draw tokens, e.g. temperature=0.7,top_p=0.9,seed=1")
    ] = None,
    gguf: Gguf = None,
    output_root: OutputRoot = None,
) -> int:
    """Talk to a model and its base, in the run's chat template or plain format. The model is a run's, or a GGUF file.

    Messages are read from standard input, one a line; /help lists the commands. Each model continues its own answers.
    """
    import io
    import sys

    from qlora_exp.errors import ConfigError, QloraExpError, nearest

    if only not in (None, "tuned", "base"):
        raise ConfigError(f"there is no model {only!r}", f"--only {only}", nearest(only or "", ("tuned", "base")))
    sampling = _sampling(sample)
    subject = _subject(run, gguf, output_root)
    from qlora_exp.inspection.chat import Conversation
    from qlora_exp.inspection.sampling import Sampling

    if only == "base" and subject.record is None:
        raise ConfigError("the base of this file isn't known", "--only base", "RUN --gguf FILE")
    talk = Conversation(subject.models(None), subject, steps, sampling or Sampling())
    sides = [only] if only else talk.sides
    for note in subject.notes:
        print(f"note: {note}.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    print(f"{subject.name}: {' and '.join(sides)}.")
    if not talk.is_chat:
        print(f"The format is plain: each message is a whole prompt{_example_of(subject)}.")
    print("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation.")
    while (line := _next_message()) is not None:
        message = line.strip()
        if message in ("/quit", "/exit"):
            break
        try:
            if message.startswith("/"):
                sides = _command(message, talk, sides)
            elif message:
                _answer(line if talk.is_chat else line.replace("\\n", "\n"), talk, sides)
        except KeyboardInterrupt:
            print("\nstopped: the answer isn't part of the conversation", flush=True)
        except QloraExpError as error:
            print(f"error: {error}", flush=True)
    return 0


def _example_of(subject: Subject) -> str:
    """Return a prompt of the run, in the form in which it can be typed."""
    from itertools import chain

    from qlora_exp.errors import RecordError
    from qlora_exp.inspection.page import printable
    from qlora_exp.records.items import read_items

    try:
        rows = read_items(subject.paths.folder) if subject.paths is not None else []
    except RecordError:
        rows = []
    prompts = chain((row["prompt"] for row in rows if row["prompt"] and len(row["prompt"]) < 300), [None])
    prompt = next(prompts)
    return "" if prompt is None else f", as {printable(prompt.replace(chr(10), chr(92) + 'n'))} (\\n is a line break)"


def _next_message() -> str | None:
    """Return the next line from standard input, with line editing on a terminal; ``None`` at its end."""
    import contextlib
    import sys

    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  input() uses it
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return ""
    print("> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        print()
    return line.rstrip("\n") if line else None


def _answer(message: str, talk: Conversation, sides: Sequence[str]) -> None:
    """Print the answers while they are generated."""
    from qlora_exp.errors import QloraExpError
    from qlora_exp.inspection.page import printable

    for side in sides:
        print(f"{side}: ", end="", flush=True)
        try:
            answer = talk.answer(message, side, lambda text: print(printable(text), end="", flush=True))
        except QloraExpError:
            print()
            raise
        print("" if answer else EMPTY)


def _command(message: str, talk: Conversation, sides: list[str]) -> list[str]:
    """Carry out a command of the conversation, and return which models answer from now on."""
    from qlora_exp.errors import ConfigError, nearest
    from qlora_exp.inspection.sampling import Sampling
    from qlora_exp.records.files import write_json

    name, _, rest = message.strip().partition(" ")
    if name in ("/tuned", "/base", "/both"):
        if name != "/tuned" and not talk.models.has_base:
            raise ConfigError("the base of this file isn't known", name, "qlora-exp chat RUN --gguf FILE")
        sides = [name[1:]] if name != "/both" else talk.sides
        print(f"{' and '.join(sides)} from now on")
    elif name == "/sample":
        talk.sampling = Sampling() if rest in ("", "off") else _sampling(rest) or Sampling()
        print("tokens are drawn" if talk.sampling.temperature > 0 else "the most likely tokens are taken")
    elif name == "/system":
        if not talk.is_chat:
            raise ConfigError("the plain format has no system message", name, "write it into the prompt")
        talk.system = rest or None
        talk.forget()
        print(f"a new conversation, {'with' if rest else 'without'} a system message")
    elif name == "/new":
        talk.forget()
        print("a new conversation")
    elif name == "/inspect":
        if not talk.last_steps:
            raise ConfigError("the tuned model hasn't answered yet", name, "a message first")
        _print_steps(talk.last_steps, 3)
    elif name == "/save":
        if not rest:
            raise ConfigError("there is no file to save to", name, "/save FILE")
        file, record = Path(rest).expanduser(), talk.subject.record
        _make_folder_of(file, "/save FILE")
        turns = {side: [{"role": role, "content": text} for role, text in talk.turns[side]] for side in talk.turns}
        run = {"run_id": record.run_id if record is not None else None, "file": talk.subject.file}
        try:
            write_json(file, {**run, "system": talk.system, **turns})
        except OSError as error:
            raise _not_written(file, error.strerror, "/save FILE") from None
        print(f"saved: {file}")
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
    from qlora_exp.inspection.page import option_line, printable

    for note in inspection.notes:
        print(f"note: {note}.")
    print(printable(inspection.prompt))
    print(f"({len(inspection.prompt_tokens)} tokens; · is a space, ⏎ a line break)\n")
    _print_steps(inspection.steps, top)
    print(f"\ntuned:        {printable(inspection.answer.strip()) or EMPTY}")
    if inspection.base_answer is not None:
        print(f"base:         {printable(inspection.base_answer.strip()) or EMPTY}")
    if inspection.expected is not None:
        print(f"right answer: {inspection.expected}")
    if inspection.options:
        print()
        lines = option_line(inspection.options, inspection.expected, OPTIONS_SHOWN)
        marks = ["← right" if one.label == inspection.expected else "" for one in lines]
        cells = [
            (one.label, f"{one.tuned:.3f}", _figure(one.base, 3), mark) for one, mark in zip(lines, marks, strict=True)
        ]
        print_table(plain_table((f"label (of {len(inspection.options)})", "p tuned", "p base", ""), cells))


def _print_steps(steps: Sequence[GeneratedToken], shown: int) -> None:
    from qlora_exp.formatting import plain_table, print_table
    from qlora_exp.inspection.page import visible_token

    headings: tuple[str, ...] = ("", "token", "tuned", "base", "base rank", "entropy", "KL", "tuned, or", "base says")
    if all(step.probability_base is None for step in steps):
        headings = ("", "token", "tuned", "entropy", "tuned, or")
    rows = [(str(number), *_cells(step, shown)) for number, step in enumerate(steps)]
    print_table(plain_table(headings, rows))
    for number, step in enumerate(steps):
        if step.drawn_from is not None:
            drawn = ", ".join(f"{visible_token(one.text)} {one.probability:.3f}" for one in step.drawn_from)
            chance = _figure(step.drawn_probability, 3)
            print(f"step {number} was drawn with {chance} from {step.drawn_candidates} tokens: {drawn}")


def _cells(step: GeneratedToken, shown: int) -> tuple[str, ...]:
    """Return a step's cells: of the tuned model the other likely tokens, of the base its most likely ones."""
    from qlora_exp.inspection.page import visible_token

    others = [one for one in step.top_tuned if one.token_id != step.token_id][: shown - 1]
    tuned, base = (
        "  ".join(f"{visible_token(one.text)} {one.probability:.2f}" for one in alternatives)
        for alternatives in (others, step.top_base[: max(1, shown - 2)])
    )
    text = visible_token(step.text) + (" (forced)" if step.forced else "")
    if step.probability_base is None:
        return text, f"{step.probability_tuned:.3f}", f"{step.entropy_tuned:.2f}", tuned
    return (
        *(text, f"{step.probability_tuned:.3f}", _figure(step.probability_base, 3), str(step.rank_base)),
        *(f"{step.entropy_tuned:.2f}", _figure(step.divergence, 2), tuned, base),
    )


def _figure(value: float | None, digits: int) -> str:
    from qlora_exp.formatting import UNKNOWN_CELL

    return UNKNOWN_CELL if value is None else f"{value:.{digits}f}"
