"""Job files: YAML with the fields of a frozen pydantic model, and flags that override them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import InputError

Config = TypeVar("Config", bound=BaseModel)

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class Frozen(BaseModel):
    """Base model of jobs, recipes and reports: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Reported(Frozen):
    """Base model of reports: figures of a run that diverged are NaN or infinite, and the report must still be JSON."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


def parse_yaml(text: str) -> Any:
    """Plain YAML data, with the scalars of YAML 1.2: only true and false are booleans, and 3e-4 is a number.

    PyYAML follows 1.1, where `save_strategy: no` is False and `learning_rate: 3e-4` a string. Raises yaml.YAMLError.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # A copy: the dictionary of the base class is shared by every user of PyYAML in this process.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in (_BOOL, _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    number = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    Loader.add_implicit_resolver(_FLOAT, re.compile(number), list("-+0123456789."))
    return yaml.load(text, Loader)  # a SafeLoader: plain data only


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, dashes in its keys as underscores. Raises InputError naming the file."""
    import yaml

    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{path}: expected a mapping of field names to values, found {type(data).__name__}")
    return {key.replace("-", "_"): value for key, value in data.items()}


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given: neither None nor, where a flag may be repeated, an empty tuple."""
    return {name: value for name, value in flags.items() if value is not None and value != ()}


def build_config(
    kind: type[Config], config: str | Mapping[str, Any] | None, flags: Mapping[str, Any], where: str
) -> Config:
    """A `kind` made of the fields in a YAML file (or already read from one), overridden by the `given` flags.

    Raises InputError naming the field and `where`, the command.
    """
    data = read_yaml(config) if isinstance(config, str) else dict(config or {})
    try:
        return kind.model_validate(data | given(flags))
    except ValidationError as error:
        raise InputError("; ".join(_explain(kind, item, where) for item in error.errors()[:3])) from None


def _explain(kind: type[BaseModel], item: Any, where: str) -> str:
    name = ".".join(str(part) for part in item["loc"])
    option = "--" + name.replace("_", "-") if name else where
    if item["type"] == "missing":
        return f"{where}: {option} is missing"
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, list(kind.model_fields), n=1)
        return f"{where}: there is no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {option if name else ''}{': ' if name else ''}{message}" + (
        f" (found {str(item['input'])[:60]!r})" if name else ""
    )
