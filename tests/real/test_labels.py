"""Labels as people write them: one letter, ratings, labels that begin other labels, one label in two normal forms."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_exp.compose import compose
from qlora_exp.data import load_data
from qlora_exp.paths import EMBEDDED

TURN_ENDS = {
    "chatml": "<|im_end|>\n",
    "gemma": "<end_of_turn>\n",
    "llama3": "<|eot_id|>",
    "llama2": " </s>",
    "worded": "\nEnd of the answer.\n",
}


def template(end: str) -> str:
    written = end.replace("\n", "\\n")
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':\\n' + message['content'] | trim + '"
        + written
        + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:\\n' }}{% endif %}"
    )


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def instruct() -> Any:
    return AutoTokenizer.from_pretrained(str(EMBEDDED / "instruct"))


@pytest.mark.parametrize("end", TURN_ENDS.values(), ids=TURN_ENDS)
def test_a_one_letter_answer_is_itself_and_never_a_letter_of_the_template(
    end: str, instruct: Any, write_rows: Callable[..., Path]
) -> None:
    answers = [*string.ascii_letters, *string.digits, ".", "End", "|", ">"]
    rows = [{"prompt": f"Question {n}:", "completion": answer} for n, answer in enumerate(answers)]
    path = write_rows(rows)
    instruct.chat_template = template(end)
    options = ["task=local", f"task.path={path}", "task.format=chat", "task.test_fraction=0"]
    splits = load_data(compose(options), instruct, 512)
    items = (*splits.train, *splits.validation)
    assert len(items) == len(rows)
    for item in items:
        assert item.completion == item.answer
        assert instruct.decode(item.end_ids) == end
