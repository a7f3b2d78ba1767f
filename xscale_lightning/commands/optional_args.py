"""`model.optional_args` of a configuration file: arguments for the methods that have them, left out for the others.

So one overlay, such as `configs/quickstart.yaml`, makes the decoder of one method and the predictor of another small.
Where a method has a host, what the host alone has goes into `host_args`; and a configuration's `host_args` are laid
over those of the configurations before it, as everything else is, while the host stays the same.
"""

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from xscale_lightning.commands.stage_options import CONFIG_OPTIONS, content_of, options
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.discovery import class_path, load_class

KEY = "optional_args"


def settle_optional_args(args: list[str]) -> list[str]:
    """`args` in which every configuration with `model.optional_args` has them under `model.init_args`, or not at all.

    Raises:
        UserError: an optional argument that no method has, or one that is under `init_args` as well.
    """
    method = _method(args)
    known = set(_arguments(method)) if method else set()
    host = _host(args, method) if "host_args" in known else None
    hosted = set(_arguments(host)) - known if host else set()
    out, rest = list[str](), 0
    host_name, host_args = _default_host(method), dict[str, Any]()
    for option, text, start, stop in options(args):
        content = content_of(text) if option in CONFIG_OPTIONS and text else {}
        model = content.get("model")
        if not isinstance(model, dict):
            continue
        changed, given, certain = KEY in model, model.pop(KEY, None) or {}, dict(model.get("init_args") or {})
        theirs = certain.get("host_args") or {}
        if not isinstance(theirs, Mapping):
            raise UserError(f"model.host_args: {theirs!r} is not possible; give the host's arguments, by name.")
        for name in given:
            _check(name, {**certain, **theirs})
        if host:
            if certain.get("host", host_name) != host_name:
                host_name, host_args = certain["host"], {}
            own = {name: value for name, value in given.items() if name in hosted} | dict(theirs)
            changed |= bool(own and host_args)
            host_args = certain["host_args"] = laid_over(host_args, own)
        if changed:
            model["init_args"] = {**{name: value for name, value in given.items() if name in known}, **certain}
            out, rest = [*out, *args[rest:start], "--config", json.dumps(content, default=str)], stop
    return [*out, *args[rest:]]


def _method(args: list[str]) -> type | None:
    """Class of the last method that a configuration or an option names; None where the parser will refuse it."""
    path = None
    for option, text, _, _ in options(args):
        if option in CONFIG_OPTIONS and text:
            model = content_of(text).get("model")
            path = (model.get("class_path") if isinstance(model, dict) else None) or path
        elif option in ("--model", "--model.class_path") and text:
            path = class_path(text)
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None
    return (
        found
        if isinstance(found, type)
        else next((cls for cls in _subclasses(SSLModule) if cls.__name__ == path), None)
    )


def _host(args: list[str], method: type | None) -> type | None:
    """Class of the last host that a configuration or an option names, else the method's default."""
    name = _default_host(method)
    for option, text, _, _ in options(args):
        if option in CONFIG_OPTIONS and text:
            model = content_of(text).get("model")
            name = ((model.get("init_args") or {}).get("host") if isinstance(model, dict) else None) or name
        elif option in ("--model.host", "--model.init_args.host") and text:
            name = text
    try:
        return load_class(str(name))
    except UserError:  # the method will say so
        return None


def _default_host(method: type | None) -> Any:
    host = inspect.signature(method).parameters.get("host") if method else None
    return host.default if host else None


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, group by group."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _arguments(cls: type) -> Iterator[str]:
    """Names of the constructor arguments of `cls`, and of its bases where it passes `**kwargs` on."""
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        yield from parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            return


def _check(name: str, certain: dict) -> None:
    if name in certain:
        raise UserError(f"model.{KEY}.{name} is under model.init_args, too: give it once.")
    known = {argument for cls in _subclasses(SSLModule) for argument in _arguments(cls)}
    if name not in known:
        near = get_close_matches(str(name), sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`xscale methods` lists the methods."
        raise UserError(f"model.{KEY}: no method has an argument {name!r}: {hint}")


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
