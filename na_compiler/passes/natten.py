"""NATTEN's modules become ours. They are known by what they are: natten is never imported, whatever it is called."""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any

from torch import nn

from na_compiler.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from na_compiler.parameters import flags_per_axis, ints_per_axis
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.window import SHIFT

__all__ = ["convert", "convert_modules", "is_ours"]

_LOG = logging.getLogger("na_compiler")
_MODULE = re.compile(r"NeighborhoodAttention([123])D")
_ALIKE = re.compile(r"Neighbou?rhood\w*Attention")
_OURS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
# What a module of NATTEN's has inside, of all versions.
_CHILDREN = {"attn_drop", "proj", "proj_drop", "qkv"}
_CONVERTED = "converted"


def convert(model: nn.Module, *, report: dict[str, str] | None = None) -> nn.Module:
    """Swap NATTEN's modules in a model for ours, and say so in the log.

    Parameters
    ----------
    model
        Changed in place. Parameters, buffers, hooks and the training flag are kept, not copied: an optimizer that has
        the parameters still has them.
    report
        Gets what became of each module that looks like NATTEN's, by its qualified name: ``"converted"``, or why it
        was left alone. The log has the same: at level INFO, and at WARNING where something was left alone or nothing
        found.

    Returns
    -------
    nn.Module
        The model; or its replacement, where the model is one of NATTEN's modules itself.

    Raises
    ------
    NotImplementedError
        For a module with something that ours have not: dropout of attention weights. Nothing is changed then.

    Notes
    -----
    A module is NATTEN's if its class, or one it is derived from without a ``forward`` of its own, is called
    ``NeighborhoodAttention1D``, ``2D`` or ``3D``, it has ``qkv`` and ``proj`` and nothing besides that is not known,
    and, where the package is not called natten (loaded from a model hub it is not), its ``forward`` calls
    ``na1d``, ``na2d`` or ``na3d``, or NATTEN's function of all ranks.

    Examples
    --------
    >>> import natten  # doctest: +SKIP
    >>> report = {}
    >>> model = na_compiler.convert(MyModelWithNatten(), report=report)  # doctest: +SKIP
    """
    converted, found = convert_modules(model, strict=True)
    if report is not None:
        report.update(found)
    if not found and any(map(is_ours, converted.modules())):
        name = type(model).__name__
        _LOG.info("convert: the neighborhood attention in %s is this package's; nothing was changed", name)
    elif not found:
        _LOG.warning("convert: no module in %s looks like one of NATTEN's; nothing was changed", type(model).__name__)
    return converted


def convert_modules(model: nn.Module, *, strict: bool) -> tuple[nn.Module, dict[str, str]]:
    """Do what `convert` does; return the model and the report.

    Parameters
    ----------
    model
        Changed in place.
    strict
        Whether to raise for modules of NATTEN's with something that ours have not; otherwise they are left alone.
    """
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _looks_alike(module)]
    report: dict[str, str] = {}
    made: dict[int, nn.Module] = {}
    for name, module in found:
        try:
            if id(module) not in made:
                made[id(module)] = _converted(module)
            report[name] = _CONVERTED
        except _LackingError as lacking:
            if strict:
                raise NotImplementedError(f"{name or 'the model'} has {lacking}, which ours have not") from None
            report[name] = f"it has {lacking}, which ours have not"
        except DeclinedError as why:
            report[name] = str(why)
    for name, module in found:
        if name and id(module) in made:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[id(module)])
    _tell(report)
    return made.get(id(model), model), report


def _tell(report: dict[str, str]) -> None:
    changed = [name or "the model itself" for name, what in report.items() if what == _CONVERTED]
    if changed:
        _LOG.info("converted %d modules of NATTEN's: %s", len(changed), ", ".join(changed))
    for name, what in report.items():
        if what != _CONVERTED:
            _LOG.warning("%s was left alone: %s", name or "the model itself", what)


class _LackingError(Exception):
    """A module has something that ours have not."""


def _looks_alike(module: nn.Module) -> bool:
    """Return whether a module is NATTEN's by its name, or by half of it and nothing inside it is."""
    if is_ours(module):
        return False
    if _base(module) is not None:
        return True
    return bool(_ALIKE.search(type(module).__name__)) and not any(
        _base(child) is not None or is_ours(child) for child in module.modules()
    )


def is_ours(module: nn.Module) -> bool:
    """Return whether a module is one of this package's layers, or of those that it has under NATTEN's names."""
    own = (base.__name__ for base in type(module).__mro__ if base.__module__.partition(".")[0] == "na_compiler")
    return any(map(_ALIKE.search, own))


def _base(module: nn.Module) -> tuple[int, type] | None:
    """Return the rank of a module and the class of NATTEN's name that it is of, or is derived from."""
    for base in type(module).__mro__:
        found = _MODULE.fullmatch(base.__name__)
        if found and base.__module__.partition(".")[0] != "na_compiler":
            return int(found[1]), base
    return None


def _converted(module: Any) -> nn.Module:  # noqa: ANN401 - a class of NATTEN's, known by its attributes
    named = _base(module)
    if named is None:
        raise DeclinedError(f"{type(module).__name__} is not a class that is known here")
    rank, base = named
    kept = getattr(type(module), "forward", None) is getattr(base, "forward", None) and "forward" not in vars(module)
    need(kept, f"{type(module).__name__} computes something of its own")
    is_natten = base.__module__.partition(".")[0] == "natten"
    need(is_natten or _calls(module, base, rank), f"{base.__module__}.{base.__name__} does not call na{rank}d")
    _check_parts(module)
    dropout = getattr(module, "attn_drop", None)
    rate = getattr(dropout, "p", dropout or 0.0)
    if rate:
        raise _LackingError(f"attn_drop={rate} (0 would do, or the layers of na_compiler.compat.natten, which drop)")
    made = _OURS[rank].__new__(_OURS[rank])
    # All that a module carries: parameters, submodules, hooks, mode.
    made.__dict__.update(module.__dict__)
    embed_dim = module.qkv.in_features
    made.embed_dim, made.num_heads, made.head_dim = embed_dim, module.num_heads, embed_dim // module.num_heads
    made.scale = float(module.scale)
    try:
        for parameter, default in (("kernel_size", None), ("stride", 1), ("dilation", 1)):
            setattr(made, parameter, ints_per_axis(parameter, getattr(module, parameter, default), rank))
        causal = getattr(module, "is_causal", False)
        flags = causal if isinstance(causal, bool) else tuple(map(bool, causal))
        made.is_causal = flags_per_axis("is_causal", flags, rank)
        made.border, made.border_words = (SHIFT,) * rank, SHIFT
    except (TypeError, ValueError) as error:
        raise DeclinedError(str(error)) from None
    if getattr(made, "rpb", None) is None:
        made.register_parameter("rpb", None)
    else:
        wanted = (made.num_heads, *(2 * size - 1 for size in made.kernel_size))
        need(tuple(made.rpb.shape) == wanted, f"rpb has shape {tuple(made.rpb.shape)}, not {wanted}")
    if not hasattr(made, "proj_drop"):
        made.proj_drop = nn.Dropout(0.0)
    return made


def _check_parts(module: nn.Module) -> None:
    """Decline a module that is not made of what NATTEN's are made of."""
    children = {name for name, child in module.named_children() if child is not None}
    need({"proj", "qkv"} <= children, "it has no qkv and proj")
    need(children <= _CHILDREN, f"it has {', '.join(sorted(children - _CHILDREN))} inside, which is not known here")
    own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    need(own <= {"rpb"}, f"it has {', '.join(sorted(own - {'rpb'}))}, which is not known here")
    width, heads = getattr(module.qkv, "in_features", None), getattr(module, "num_heads", None)
    widths = [getattr(module.qkv, "out_features", None), getattr(module.proj, "in_features", None)]
    fits = isinstance(width, int) and widths == [3 * width, width]
    need(fits, "qkv and proj have not the widths of NATTEN's")
    need(isinstance(heads, int) and heads > 0 and not (width or 0) % heads, f"num_heads is {heads}")
    need(isinstance(getattr(module, "scale", None), (int, float)), "it has no scale")


def _calls(module: nn.Module, base: type, rank: int) -> bool:
    """Return whether the forward of a class calls neighborhood attention: a function of NATTEN's name for it."""
    forward = inspect.unwrap(getattr(base, "forward", None) or len)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    wanted = {f"na{rank}d", "neighborhood_attention_generic"}
    # By the name that is written there, or the name of what is kept under another.
    meant = {getattr(getattr(module, name, None), "__name__", "") for name in names}
    return bool(wanted & ({*names} | meant))
