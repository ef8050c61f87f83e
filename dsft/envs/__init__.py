"""Games whose best moves can be computed: levels, rules as text, experts. Nothing here imports torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsft.config import EnvironmentFlags
    from dsft.envs.base import Environment

MODULES = {"sokoban": "dsft.envs.sokoban", "frozenlake": "dsft.envs.frozen_lake"}


def make_environment(flags: "EnvironmentFlags") -> "Environment":
    """The environment that the flags name, with their settings. Each module has its own `from_flags`."""
    assert flags.env is not None
    environment: Environment = import_module(MODULES[flags.env]).from_flags(flags)
    return environment
