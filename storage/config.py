"""Job files: YAML with the fields of a frozen pydantic model, and flags that override them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from storage.errors import InputError, error_text
from storage.files import local_path

Config = TypeVar("Config", bound=BaseModel)

_BOOL, _INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "merge"))
# What was expected, for pydantic's error types: in the words of YAML and of a command line.
_EXPECTED = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of names to values"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text (in YAML, quotes make a text of a number, a date or true)",
}

Folder = Annotated[str, AfterValidator(lambda text: str(local_path(text)))]
"""A folder of this machine: `~` is expanded."""


class Frozen(BaseModel):
    """Base model of jobs, recipes and reports: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Reported(Frozen):
    """Base model of reports: figures of a run that diverged are NaN or infinite, and the report must still be JSON."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Settings(Frozen):
    """Base model of what a person writes: in YAML, as flags, or in Python.

    A single value where a list is expected is a list of one, and any os.PathLike a text.
    """

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        lists = {name for name, field in cls.model_fields.items() if _is_list(field.annotation)}
        return {name: _written(value, name in lists) for name, value in data.items()}


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(get_origin(each) is tuple for each in get_args(annotation))


def _written(value: Any, listed: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [_written(item, listed=False) for item in value]
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return [value] if listed and isinstance(value, (str, int, float)) else value


def parse_yaml(text: str, where: str = "YAML") -> Any:
    """Plain YAML data, with the scalars of YAML 1.2: only true and false are booleans, and 3e-4 is a number.

    PyYAML follows 1.1, where `save_strategy: no` is False, `learning_rate: 3e-4` a string, `time: 1:30:00` the number
    5400, and 012 ten.

    Raises yaml.YAMLError, and InputError, which begins with `where`, for a key that is given twice in a mapping. On the
    first level, where the fields of a job are, `a-b` and `a_b` are one key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_mapping_node(self, anchor: Any) -> Any:
            self.depth += 1
            node = super().compose_mapping_node(anchor)
            self.depth -= 1
            lines: dict[str, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE):
                name = key.value if self.depth else key.value.replace("-", "_")
                line = key.start_mark.line + 1
                if name in lines:
                    raise InputError(
                        f"{where}: {key.value!r} is given twice, in lines {lines[name]} and {line}: leave one out"
                    )
                lines[name] = line
            return node

    # A copy: the dictionary of the base class is shared by every user of PyYAML in this process.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in (_BOOL, _INT, _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    number = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    whole = r"^[-+]?[0-9][0-9_]*$|^0o[0-7_]+$|^0x[0-9a-fA-F_]+$|^0b[01_]+$"
    Loader.add_implicit_resolver(_INT, re.compile(whole), list("-+0123456789"))
    Loader.add_constructor(_INT, _integer)
    Loader.add_implicit_resolver(_FLOAT, re.compile(number), list("-+0123456789."))
    return yaml.load(text, Loader)  # a SafeLoader: plain data only


def _integer(_: Any, node: Any) -> int:
    text = node.value.replace("_", "")
    return int(text, 0 if text[:2] in ("0o", "0x", "0b") else 10)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, dashes in its keys as underscores. Raises InputError naming the file."""
    import yaml

    try:
        data = parse_yaml(local_path(path).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error_text(error, None)}") from None
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
        raise InputError("; ".join(explained(kind, item, where) for item in error.errors()[:3])) from None


def explained(kind: type[BaseModel], item: Any, where: str, field: str = "--") -> str:
    """One of pydantic's errors in the words of YAML and flags: `where`, the field, what was expected and found.

    field: what the name of a field of `kind` begins with; with `--`, it is written as a flag.
    """
    name, *below = item["loc"] or ("",)
    path = [f"item {part + 1}" if isinstance(part, int) else str(part) for part in below]
    shown = f"{field}{str(name).replace('_', '-') if field == '--' else name}" if name else ""
    shown = ", ".join([shown, *path])
    if item["type"] == "missing":
        return f"{where}: {shown} is missing"
    if item["type"] == "extra_forbidden":
        close = [] if below else difflib.get_close_matches(str(name), list(kind.model_fields), n=1)
        unknown = ".".join(str(part) for part in item["loc"])
        return f"{where}: there is no field {unknown!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in _EXPECTED:
        message = f"expected {_EXPECTED[item['type']]}"
    elif item["type"] != "value_error":
        # pydantic's "Input should be less than 5", "Tuple should have at least 1 item after validation, not 0"
        message = re.sub(r"^\w+ should (?:be|have)?", "expected", message).removesuffix(" after validation, not 0")
    found = f" (found {str(item['input'])[:60]!r})" if name else ""
    return f"{where}: {shown}{': ' if shown else ''}{message}{found}"


def name_values(given: Any, example: str) -> dict[str, str]:
    """NAME=VALUE texts, one or several, as a mapping; of a name given twice the last holds, as of a flag.

    Raises InputError for other texts.
    """
    found: dict[str, str] = {}
    for item in [given] if isinstance(given, str) else given:
        name, equals, value = (part.strip() for part in str(item).partition("="))
        if not name or not equals:
            raise InputError(f"{item!r}: expected NAME=VALUE, such as {example}")
        found[name] = value
    return found
