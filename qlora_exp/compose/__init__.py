"""Overrides in, typed configuration out: every mistake in them found at once, before anything expensive."""

from qlora_exp.compose.configuration import (
    GRID_CHECK_LIMIT,
    Composer,
    built,
    check_hydra,
    check_multirun,
    check_points,
    checked,
    compose,
    compose_raw,
)
from qlora_exp.compose.files import default_choices, read_choice
from qlora_exp.compose.grammar import first_choice, is_hydra, is_swept, key_of, value_of, without_globs
from qlora_exp.compose.groups import groups
from qlora_exp.compose.interpolation import (
    depends_on,
    settings_from_outside,
    texts_of,
    unresolved,
    value_now,
    without_outside,
)
from qlora_exp.compose.official import problems_in
from qlora_exp.compose.problems import problems_of, typed_value
from qlora_exp.compose.search import SEARCH_PATH, search_folders, search_path

__all__ = [
    "GRID_CHECK_LIMIT",
    "SEARCH_PATH",
    "Composer",
    "built",
    "check_hydra",
    "check_multirun",
    "check_points",
    "checked",
    "compose",
    "compose_raw",
    "default_choices",
    "depends_on",
    "first_choice",
    "groups",
    "is_hydra",
    "is_swept",
    "key_of",
    "problems_in",
    "problems_of",
    "read_choice",
    "search_folders",
    "search_path",
    "settings_from_outside",
    "texts_of",
    "typed_value",
    "unresolved",
    "value_now",
    "value_of",
    "without_globs",
    "without_outside",
]
