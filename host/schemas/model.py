"""Models of shapes: pydantic checks payloads by them."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from host.schemas.shape import Choice, Many, Record, Scalar, Shape, Table
from isolator.errors import UsageError

_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "object": dict[str, Any]}
_ARGUMENTS = {
    "maxLength": "max_length", "minLength": "min_length", "pattern": "pattern", "minimum": "ge", "maximum": "le",
    "maxItems": "max_length", "minItems": "min_length",
}  # fmt: skip


def make(event: str, shape: Record, base: type[BaseModel], *, stored: bool = False) -> type[BaseModel]:
    """Make the model of an event's payload, and of what is nested in it, as subclasses of ``base``.

    Raises UsageError for what cannot be checked; of a ``stored`` shape, at the first payload.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # a field may have the name of a method, which nobody calls
            model = _Maker(base).model(shape, "".join(part.title() for part in re.split(r"[._]", event)))
        if not stored:
            model.model_rebuild(force=True)
    except (PydanticUserError, SchemaError, NameError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        why = lines[-1 if isinstance(error, SchemaError) else 0].strip()
        raise UsageError(f"event {event}", f"no model can be made of its schema: {why}", "mend that") from None
    return model


class _Maker:
    def __init__(self, base: type[BaseModel]) -> None:
        self._base = base
        self._models: dict[int, type[BaseModel]] = {}
        """By the identity of their shapes: what is named twice is one model."""

    def model(self, shape: Record, name: str) -> type[BaseModel]:
        if id(shape) not in self._models:
            fields: dict[str, Any] = {}
            for key, one in shape.fields.items():
                kind = self._kind(one.shape)
                default = ... if one.required else None
                about = Field(default, description=one.description, examples=one.examples)
                fields[key] = (kind if one.required else kind | None, about)
            self._models[id(shape)] = create_model(name, __base__=self._base, **fields)
        return self._models[id(shape)]

    def _kind(self, shape: Shape) -> Any:
        match shape:
            case Record():
                return self.model(shape, shape.name)
            case Table():
                return dict[str, self._kind(shape.value)]  # type: ignore[misc] # made at run time
            case Choice():
                return Literal[shape.values]
            case Many():
                return _within(list[self._kind(shape.item)], shape.limits)  # type: ignore[misc]
            case Scalar():
                return _within(_SCALARS[shape.kind], shape.limits)


def _within(kind: Any, limits: Any) -> Any:
    return Annotated[kind, Field(**{_ARGUMENTS[key]: value for key, value in limits.items()})] if limits else kind
