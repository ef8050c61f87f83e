"""Sharding backends. Each imports its library only when it is chosen."""

from importlib import import_module

from dsft.backends.base import Backend

BACKENDS = {"fsdp": "dsft.backends.fsdp:FsdpBackend", "zero3": "dsft.backends.zero3:Zero3Backend"}


def backend_class(name: str) -> type[Backend]:
    """The class of a name in BACKENDS; imports its module."""
    module, _, class_name = BACKENDS[name].partition(":")
    return getattr(import_module(module), class_name)
