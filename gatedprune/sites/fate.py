"""What becomes of a value's memory after it was computed: training may keep it only if nothing writes over it."""

from __future__ import annotations

from torch import fx

from .operators import op_name

__all__ = ["fate"]

# In evaluation they return what they were given, and their schema does not say so.
_MAY_RETURN_THE_SAME = frozenset(("dropout", "feature_dropout", "alpha_dropout", "type_as"))
# f(x) = x wherever they have a gradient.
_RECTIFIERS = frozenset(("relu", "relu6", "hardtanh"))


def fate(value: fx.Node) -> str | None:
    """ "kept", "rectified" or None: see `gatedprune.sites.Attach`."""
    todo, alone = [value], True
    while todo:
        here = todo.pop()
        alone = alone and len(here.users) == 1
        for user in here.users:
            schema = getattr(user.target, "_schema", None)
            if schema is None:  # the model's output, or a Python function
                return None
            given = [*zip(user.args, schema.arguments, strict=False)]
            given += [
                (a, argument) for argument in schema.arguments if (a := user.kwargs.get(argument.name)) is not None
            ]
            for argument in (
                parameter for a, parameter in given if a is here or isinstance(a, list | tuple) and here in a
            ):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    return "rectified" if alone and op_name(user.target) in _RECTIFIERS else None
                if argument.alias_info is not None or op_name(user.target) in _MAY_RETURN_THE_SAME:
                    todo.append(user)
    return "kept"
