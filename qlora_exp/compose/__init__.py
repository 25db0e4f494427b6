"""Overrides in, typed configuration out: every mistake in them found at once, before anything expensive."""

from qlora_exp.compose.configuration import (
    GRID_CHECK_LIMIT,
    Composer,
    check_multirun,
    check_points,
    checked,
    compose,
    compose_raw,
)
from qlora_exp.compose.grammar import is_hydra, is_swept, key_of, value_of, without_globs
from qlora_exp.compose.groups import groups
from qlora_exp.compose.problems import problems_of
from qlora_exp.compose.search import SEARCH_PATH, search_folders, search_path

__all__ = [
    "GRID_CHECK_LIMIT",
    "SEARCH_PATH",
    "Composer",
    "check_multirun",
    "check_points",
    "checked",
    "compose",
    "compose_raw",
    "groups",
    "is_hydra",
    "is_swept",
    "key_of",
    "problems_of",
    "search_folders",
    "search_path",
    "value_of",
    "without_globs",
]
