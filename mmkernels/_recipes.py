"""Recipes: YAML files read strictly into dataclasses."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmkernels.errors import ConfigError, nearest


def read_yaml(function: str, source: str | Path, bundled: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a YAML file, or of one that comes with the package, by its name.

    Raises:
        ConfigError: no such file or name, not YAML, or no mapping.
    """
    import yaml

    path = Path(source)
    if str(source) in bundled:
        text = bundled[str(source)].read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"{function}: source must be a YAML file or a recipe of the package; got {str(source)!r}. "
            f"{nearest(str(source), bundled)}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{function}: source must be valid YAML; got {source}: {error}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{function}: source must hold fields and their values; got {type(values).__name__} in {source}. "
            "Start from one of the package's recipes."
        )
    return values


def one_of(where: str, name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a value that is not one of the known ones, naming the nearest."""
    if value not in known:
        raise ConfigError(f"{where}: {name} must be known; got {value!r}. {nearest(str(value), known)}")


def require(where: str, name: str, value: Any, good: bool, wanted: str) -> None:
    """Refuse a value that is not good, saying what is wanted."""
    if not good:
        raise ConfigError(f"{where}: {name} must {wanted}; got {value!r}. Change {name}.")


def plain(value: Any) -> Any:
    """Nested dicts and lists, as a YAML or JSON file holds them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def read_fields(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from a mapping: field names and types checked, nested ones too.

    Raises:
        ConfigError: an unknown or missing field, a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must be a mapping of fields; got {values!r}. Fields: {', '.join(fields)}.")
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}: fields must be known; got {str(name)!r}. {nearest(str(name), fields)}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise ConfigError(
            f"{where}: fields without a default must be given; got none for {', '.join(missing)}. Add them."
        )
    hints = get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or a ConfigError; only int -> float and YAML's "1e-3" are converted."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in inner:
            if option is type(None) and value is None:
                return None
            if option is not type(None) and _looks_like(option, value):
                return _convert(option, value, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        each = inner[0] if len(inner) == 2 and inner[1] is Ellipsis else None
        if each is not None or len(value) == len(inner):
            return tuple(_convert(each or inner[i], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif dataclasses.is_dataclass(hint):
        return read_fields(hint, value, where)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 (without a dot) as a string
        except ValueError:
            pass
    elif _looks_like(hint, value):
        return value
    raise ConfigError(f"{where}: must be {_type_name(hint)}; got {value!r}. Correct the value.")


def _looks_like(hint: Any, value: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", type(None): "empty"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"a list of {'' if inner[-1] is Ellipsis else f'{len(inner)} '}entries"
    return names.get(hint, "a mapping" if dataclasses.is_dataclass(hint) else str(hint))
