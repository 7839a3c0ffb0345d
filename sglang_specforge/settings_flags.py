"""argparse flags made from a settings model: one a field, all text, so that the model itself validates them."""

import argparse
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def add_settings_flags(group: Any, model: type[BaseModel], prefix: str = "") -> None:
    """``--<prefix><name>`` for each field; ``group`` is an argparse parser or group. A bool may stand alone."""
    for name, field in model.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"default: {field.default}"
        more: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        if _extra(model, name).get("repeats"):
            more = {"action": "append"}
        group.add_argument(
            flag_of(model, name, prefix),
            dest=prefix + name,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{field.description} ({default})".replace("%", "%%"),
            **more,
        )


def flag_of(model: type[BaseModel], name: str, prefix: str = "") -> str:
    """The flag of a field: its own (``json_schema_extra``), or by its name."""
    return "--" + _extra(model, name).get("flag", (prefix + name).replace("_", "-"))


def given_settings(args: argparse.Namespace, model: type[BaseModel], prefix: str = "") -> dict[str, str | list[str]]:
    """Fields whose flag was given, as text; of a flag that may be repeated, the texts."""
    values = {name: getattr(args, prefix + name, None) for name in model.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def _extra(model: type[BaseModel], name: str) -> dict[str, Any]:
    return getattr(model.model_fields.get(name), "json_schema_extra", None) or {}
