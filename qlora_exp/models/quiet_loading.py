"""Loading without transformers' progress bars and reports, and with its errors raised."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import transformers
from transformers import core_model_loading, modeling_gguf_pytorch_utils

from qlora_exp.progress import report_progress
from qlora_exp.system.device_errors import is_device_error

MEGABYTE = 10**6
HUB_BARS = ("huggingface_hub.utils.tqdm", "huggingface_hub.utils._xet_progress_reporting")
"""Modules whose ``tqdm`` is the bar of a download."""


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Switch off progress bars and load reports: errors are raised here, not logged.

    While it quantizes a weight, transformers turns every exception into a line of its report. It goes on, and finally
    raises an error without the reason. An error of memory or CUDA would so look like a damaged file: it is raised.
    """
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    collect_errors = getattr(core_model_loading, "log_conversion_errors", None)  # private: not in every version
    if collect_errors is not None:
        core_model_loading.log_conversion_errors = _without_device_errors(collect_errors)
    set_hook = getattr(log, "set_tqdm_hook", None)  # not in every version
    earlier_hook = set_hook(_counted) if set_hook is not None else None
    modules = [importlib.import_module(name) for name in HUB_BARS]
    download_bars = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = CountedDownload  # type: ignore[attr-defined]
    gguf_bars = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda *args, **kwargs: _counted(log.EmptyTqdm, args, kwargs)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bars
        for module, bar in zip(modules, download_bars, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]
        if set_hook is not None:
            set_hook(earlier_hook)
        if collect_errors is not None:
            core_model_loading.log_conversion_errors = collect_errors
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


class CountedDownload:
    """Takes the place of huggingface_hub's bar: reports the megabytes of a file, and draws nothing.

    transformers downloads the files of a model one after the other. Files on Xet storage have two bars: of bytes that
    came, and of bytes that were written; the second counts.
    """

    format_dict: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any, total: int | None = None, initial: int = 0, desc: str = "", **kwargs: Any) -> None:
        self.n, self.total, self.desc = initial, total, desc

    def update(self, n: float | None = 1) -> None:
        """Count ``n`` more bytes."""
        self.n += int(n or 0)
        file, _, what = self.desc.partition(": ")
        if self.total is not None and self.total >= MEGABYTE and what != "downloading bytes":
            unit = f"MB of {file.rpartition('/')[2]} downloaded"
            report_progress(self.n // MEGABYTE, self.total // MEGABYTE, unit, share=min(self.n / self.total, 1.0))

    def __enter__(self) -> CountedDownload:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Ignore what draws: ``set_postfix_str``, ``refresh``, ``close`` …"""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _counted(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return transformers' bar, if it goes through a sequence: with reports of the progress, and without drawing."""
    if args and hasattr(args[0], "__len__"):
        unit = "tensors of the GGUF unpacked" if "GGUF" in str(kwargs.get("desc")) else "weights loaded"
        return factory(_reporting(args[0], unit), *args[1:], **kwargs)
    return factory(*args, **kwargs)


def _reporting(items: Collection[Any], unit: str) -> Iterator[Any]:
    report_progress(0, len(items), unit)
    for number, item in enumerate(items, start=1):
        yield item
        report_progress(number, len(items), unit)


def _without_device_errors(
    collect_errors: Callable[..., AbstractContextManager[None]],
) -> Callable[..., AbstractContextManager[None]]:
    """Return ``collect_errors``, which raises errors of memory and CUDA instead of collecting them."""

    @contextlib.contextmanager
    def collect_others(*arguments: Any, **named: Any) -> Iterator[None]:
        device_error: Exception | None = None
        with collect_errors(*arguments, **named):
            try:
                yield
            except Exception as error:
                if not is_device_error(error):
                    raise
                device_error = error
        if device_error is not None:
            raise device_error

    return collect_others
