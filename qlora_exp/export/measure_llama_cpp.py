"""A script for a separate process, so that it measures llama.cpp and not its caller. It loads one GGUF file on one
thread, reads a prompt, generates, and prints memory and speed as one JSON object. It doesn't import torch, and Python
can't open a socket meanwhile."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPEATS = 3


def main(path: str, context_tokens: int, generated_tokens: int) -> dict[str, Any]:
    """Return load time, memory and tokens per second (medians of :data:`REPEATS`) of the GGUF file at ``path``."""
    import llama_cpp
    import numpy as np

    before = _status_bytes("VmRSS")
    clock = time.perf_counter()
    model = llama_cpp.Llama(
        path, n_ctx=context_tokens, n_batch=context_tokens, n_threads=1, n_threads_batch=1, n_gpu_layers=0,
        verbose=False,
    )  # fmt: skip
    load_seconds = time.perf_counter() - clock
    vocabulary = model.n_vocab()
    prompt = [number % vocabulary for number in range(7, 7 + max(1, context_tokens // 2))]
    generated = max(1, min(generated_tokens, context_tokens - len(prompt)))
    prompt_rates, rates = [], []
    for _ in range(REPEATS):
        model.reset()
        clock = time.perf_counter()
        model.eval(prompt)
        prompt_rates.append(len(prompt) / (time.perf_counter() - clock))
        clock = time.perf_counter()
        for _ in range(generated):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            model.eval([int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())])
        rates.append(generated / (time.perf_counter() - clock))
    return {
        "name": f"llama-cpp-python {llama_cpp.__version__}",
        "load_seconds": load_seconds,
        "peak_resident_bytes": _status_bytes("VmHWM"),
        "resident_before_bytes": before,
        "prompt_tokens_per_second": statistics.median(prompt_rates),
        "generated_tokens_per_second": statistics.median(rates),
    }


def refuse_sockets() -> None:
    """Refuse sockets for the rest of the process: an audit hook can't be removed. Call it before any import that could
    open one. The hook sees only what Python does; llama.cpp's machine code could still open a socket."""

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event.startswith("socket."):
            raise OSError(f"a phone may be offline, and this needs a network ({event})")

    sys.addaudithook(refuse)


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(values[0]) * 1024 if values else None


if __name__ == "__main__":
    refuse_sockets()
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
