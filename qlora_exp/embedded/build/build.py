"""Rebuild the embedded pair and task: `python -m qlora_exp.embedded.build --wordnet /usr/share/wordnet --out DIR`.

The stages are corpus (WordNet -> task, held-out texts, training texts), tokenizer, base, instruct and card. Each reads
the files that the previous ones wrote. Run it on an idle machine and set OMP_NUM_THREADS. The number of steps is fixed:
a slower machine takes longer and trains the same models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from qlora_exp.embedded.build.card import write_card
from qlora_exp.embedded.build.chats import make_chats
from qlora_exp.embedded.build.general_texts import general_documents, unseen_chats
from qlora_exp.embedded.build.packing import chat_batches, entry_batches
from qlora_exp.embedded.build.pretrain import Schedule, new_model, train
from qlora_exp.embedded.build.splits import CATEGORIES, make_splits
from qlora_exp.embedded.build.tokenizer import save_tokenizer, train_tokenizer
from qlora_exp.embedded.build.training_texts import (
    TrainingTexts,
    held_out_words,
    make_chat_entries,
    make_entries,
    read_training_texts,
    trained_units,
    write_training_texts,
)
from qlora_exp.embedded.build.wordnet import read_wordnet

SEED = 1
ROW_TOKENS = 256
# About 30 and 5 minutes on two cores of 2023. More steps would lower the loss, but the build should take one hour.
BASE = Schedule(steps=1900, rows=32, learning_rate=3e-3, warmup_steps=100)
INSTRUCT = Schedule(steps=300, rows=32, learning_rate=1e-3, warmup_steps=20)
CHATS = 40_000
CHATS_HELD_OUT = 200
TEXTS = "training_texts.txt.xz"
HASHED_PATTERNS = ("base/*", "instruct/*", "task/*", "general_*.jsonl")
STAGES = ("corpus", "tokenizer", "base", "instruct", "card")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m qlora_exp.embedded.build", description=__doc__)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun …")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1], help="where to write (default: the package)"
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("BASE", "INSTRUCT"), help="fewer steps, for a trial")
    options = parser.parse_args(arguments)
    base, instruct = BASE, INSTRUCT
    if options.steps:
        base, instruct = _shortened(BASE, options.steps[0]), _shortened(INSTRUCT, options.steps[1])
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "corpus": lambda: build_corpus(options.wordnet, options.out),
        "tokenizer": lambda: build_tokenizer(options.out),
        "base": lambda: build_base(options.out, base),
        "instruct": lambda: build_instruct(options.out, instruct),
        "card": lambda: write_card(options.out),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        start = time.perf_counter()
        facts = stages[stage]()
        seconds, load = time.perf_counter() - start, os.getloadavg()[2]  # seconds say little without the machine's load
        _record_stage(options.out, stage, facts | {"stage_seconds": round(seconds, 1), "load_average": round(load, 1)})
    write_hashes(options.out)


def build_corpus(wordnet_directory: Path, out: Path) -> dict[str, Any]:
    """Write task/*.jsonl, general_text.jsonl, general_chat.jsonl and the training texts from WordNet."""
    wordnet = read_wordnet(wordnet_directory)
    splits = make_splits(wordnet, SEED)
    for split, rows in splits.items.items():
        _write_jsonl(out / "task" / f"{split}.jsonl", [asdict(row) for row in rows])
    avoid = held_out_words(wordnet, splits)
    entries = make_entries(wordnet, splits)
    chats = make_chats(entries, avoid, random.Random(f"{SEED}/chats"))[:CHATS]
    texts = TrainingTexts(entries, chats)
    write_training_texts(out / TEXTS, texts)
    trained = trained_units(texts)
    documents = general_documents(splits.examples, trained)
    _write_jsonl(out / "general_text.jsonl", [{"text": text} for text in documents])
    unseen = make_chats(make_chat_entries(wordnet, splits, entries), avoid, random.Random(f"{SEED}/general chat"))
    general_chats = unseen_chats(unseen, trained)[:CHATS_HELD_OUT]
    _write_jsonl(out / "general_chat.jsonl", [{"messages": chat} for chat in general_chats])
    return {
        "synsets": len(wordnet),
        "dropped": splits.dropped,
        "classes": {split: Counter(row.category for row in rows) for split, rows in splits.items.items()},
        "with_training_sibling": {split: sum(r.has_training_sibling for r in v) for split, v in splits.items.items()},
        "contains_label": {split: sum(r.contains_label for r in v) for split, v in splits.items.items()},
        "entries": len(entries),
        "examples": sum(len(e.examples) for e in entries),
        "kind_of_lines": sum(len(e.kinds) for e in entries),
        "kind_of_lines_to_a_label": sum(broader in CATEGORIES for e in entries for _, broader in e.kinds),
        "chats": len(chats),
        "general_text_documents": len(documents),
        "general_chats": len(general_chats),
    }


def build_tokenizer(out: Path) -> dict[str, Any]:
    """Train the tokenizers of both models on the training texts."""
    entries = read_training_texts(out / TEXTS).entries
    tokenizer = train_tokenizer(entries, SEED)
    for variant in ("base", "instruct"):
        save_tokenizer(tokenizer, out / variant, chat=variant == "instruct")
    rng = random.Random(f"{SEED}/count")
    count = sum(len(e.ids) + 1 for e in tokenizer.encode_batch([entry.render(rng) for entry in entries]))
    general = [json.loads(line)["text"] for line in (out / "general_text.jsonl").read_text("utf-8").splitlines()]
    lengths = [len(e.ids) for e in tokenizer.encode_batch(general)]
    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens_per_epoch": count,
        "general_text_tokens": sum(lengths),
        "general_text_shortest_document_tokens": min(lengths),
    }


def build_base(out: Path, schedule: Schedule) -> dict[str, Any]:
    """Train the base model on the training texts."""
    entries = read_training_texts(out / TEXTS).entries
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    model = new_model(SEED)
    batches = entry_batches(entries, tokenizer, SEED, schedule.rows, ROW_TOKENS)
    facts = train(model, batches, schedule, _print_line)
    _save(model, out / "base", eos=0)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "schedule": asdict(schedule), **asdict(facts)}


def build_instruct(out: Path, schedule: Schedule) -> dict[str, Any]:
    """Train the instruct model from the base, on the chats."""
    chats = read_training_texts(out / TEXTS).chats
    tokenizer = AutoTokenizer.from_pretrained(out / "instruct")
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    facts = train(model, chat_batches(chats, tokenizer, SEED, schedule.rows, ROW_TOKENS), schedule, _print_line)
    _save(model, out / "instruct", eos=tokenizer.eos_token_id)
    return {"schedule": asdict(schedule), **asdict(facts)}


def write_hashes(out: Path) -> None:
    """Write SHA256SUMS of the files that a run reads, for ``sha256sum --check`` and ``qlora-exp doctor``."""
    files = sorted(path for pattern in HASHED_PATTERNS for path in out.glob(pattern))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out).as_posix()}\n" for path in files]
    (out / "SHA256SUMS").write_text("".join(lines), "utf-8")


def _shortened(schedule: Schedule, steps: int) -> Schedule:
    return Schedule(steps, schedule.rows, schedule.learning_rate, min(schedule.warmup_steps, max(1, steps // 10)))


def _save(model: LlamaForCausalLM, directory: Path, eos: int) -> None:
    model.config.eos_token_id = eos
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=3, max_new_tokens=64)
    model.save_pretrained(directory)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _record_stage(out: Path, stage: str, facts: dict[str, Any]) -> None:
    path = out / "build.json"
    noted = json.loads(path.read_text("utf-8")) if path.exists() else {}
    noted |= {
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        stage: facts,
    }
    path.write_text(json.dumps(noted, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _print_line(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
