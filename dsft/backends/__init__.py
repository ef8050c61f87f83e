"""Sharding backends. Each imports its library only when it is used."""

from importlib import import_module

from dsft.backends.base import Backend

BACKENDS = {"fsdp": "dsft.backends.fsdp:FsdpBackend", "zero3": "dsft.backends.zero3:Zero3Backend"}


def backend_class(name: str) -> type[Backend]:
    """Import and return the class registered under `name` in BACKENDS."""
    module, _, class_name = BACKENDS[name].partition(":")
    return getattr(import_module(module), class_name)
