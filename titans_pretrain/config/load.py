"""YAML files that compose + dotted overrides -> a checked `Config`, and back.

A file may name others under `include:` (paths relative to itself). They are merged in order, then the file itself,
then the overrides: later wins, key by key.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from titans_pretrain.config.keys import add_defaults, unknown_key
from titans_pretrain.config.paths import hide_secrets, locate
from titans_pretrain.config.schema import CONFIG_VERSION, Config
from titans_pretrain.config.shipped import find_config, shipped_names

S = TypeVar("S")


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, references: bool = True) -> Config:
    """Config of a YAML file (None: of the defaults) with `key=value` overrides, e.g. load_config("configs/tiny.yaml",
    ["model.variant=mac"]). references=False refuses a file with `${...}`, which may look up the environment.

    Raises FileNotFoundError for a missing file and ValueError for everything else that is wrong, both with one line that
    names the file or the override to blame, the key, the value and what is legal.
    """
    return load_as(Config, path, overrides, references=references)


def load_as(schema: type[S], path: str | Path | None, overrides: Sequence[str] = (), *, references: bool = True) -> S:
    """load_config for another schema: a dataclass of groups of keys, among them `run` with `name` and `dir`."""
    path = None if path is None else find_config(path)
    file = {} if path is None else _read(path, references=references)
    parse_overrides(overrides)  # what is no override at all

    def build(texts: Sequence[str]) -> S:
        if not references:
            _map_texts(file, _refuse_reference)
        return _build(schema, file, path and path.stem, texts)

    try:
        return build(overrides)
    except ValueError as e:
        blamed = hide_secrets(_blamed(build, overrides, str(e)) or str(path or "defaults"))
        raise ValueError(f"{blamed}: {_one_line(e)}") from e


def save_config(config, path: str | Path) -> None:
    """Writes every key of a config of any schema with its value, so that `load_config(path)` gives the same config."""
    from omegaconf import OmegaConf

    values = _map_texts(dataclasses.asdict(config), escape)
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(values)))  # it quotes what its loader takes for a number


def parse_overrides(overrides: Sequence[str]) -> list[dict]:
    """The nested dicts that `key=value` texts stand for. Raises ValueError naming the text that is not of that form."""
    from omegaconf import OmegaConf

    parsed = []
    for text in overrides:
        if not all(text.partition("=")[:2]):
            raise ValueError(f"override {text!r} is not of the form key=value, e.g. train.lr=1e-3")
        try:
            parsed.append(OmegaConf.to_container(OmegaConf.from_dotlist([text])))
        except Exception as e:  # of YAML and omegaconf, which name no common one
            raise ValueError(f"the value of override {text!r} is not valid YAML: {_one_line(e)}") from e
    return parsed


@cache
def _checker(schema: type):
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def from_dict(values: dict, schema: type = Config) -> Any:
    """Checked config of nested dicts. Types are strict: 4 is a float where one is wanted, "4" is no int."""
    from pydantic import ValidationError

    version = values.get("version")
    if isinstance(version, int) and version > CONFIG_VERSION:
        raise ValueError(
            f"version {version} is newer than version {CONFIG_VERSION}, the newest this titans-pretrain reads; update titans-pretrain"
        )
    _check_keys(values, schema, (), schema)
    values = upgraded(values)
    try:
        # As JSON, because in strict mode only JSON input may give a dict for a dataclass.
        return _checker(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as e:
        raise ValueError(_explain(e.errors()[0], schema)) from e
    except TypeError as e:
        raise ValueError(f"a value has a type that no key takes: {e}") from e
    except OverflowError as e:
        raise ValueError(f"a number is too large: {e}") from e


def changed_keys(old: Config, new: Config) -> dict[str, tuple]:
    """{"train.lr": (old value, new value), ...} of all keys that differ."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def flatten(config: Config) -> dict:
    """{"train.lr": value, ...}"""
    return _flatten(dataclasses.asdict(config))


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _build(schema: type, file: dict, name: str | None, overrides: Sequence[str]) -> Any:
    """The config of a file's values and overrides. Raises ValueError that says what is wrong, not where it stands."""
    from omegaconf import OmegaConf

    try:
        merged = OmegaConf.merge(file, *parse_overrides(overrides))
        given, whole = OmegaConf.to_container(merged), OmegaConf.to_container(merged)
        if name and isinstance(run := whole.setdefault("run", {}), dict):
            run |= {"name": run.get("name") or name, "dir": run.get("dir") or "runs/${run.name}"}
        add_defaults(whole, schema)  # for references to them
        whole = OmegaConf.to_container(OmegaConf.create(whole), resolve=True, throw_on_missing=True)
    except Exception as e:  # as above
        told = _one_line(e)
        if isinstance(e, TypeError) or "ListConfig" in told:  # a list meets a mapping, as omegaconf 2.4 and 2.3 say it
            told += ": an override cannot reach into a list, give all of it, as 'model.pattern=[mag, lmm]'"
        raise ValueError(told) from e
    config = from_dict(_only(given, whole), schema)
    if name:
        config.run.name = config.run.name or name
        config.run.dir = config.run.dir or f"runs/{config.run.name}"
    if isinstance(config, Config):
        locate(config)
    return config


def _only(keys: dict, values: dict) -> dict:
    """`values` without what `keys` does not have."""
    return {
        k: _only(v, values[k]) if isinstance(v, dict) and isinstance(values[k], dict) else values[k]
        for k, v in keys.items()
    }


def _blamed(build: Callable[[Sequence[str]], Config], overrides: Sequence[str], error: str) -> str:
    """The overrides without which there would be no such error."""

    def error_without(text: str) -> str | None:
        try:
            build([other for other in overrides if other != text])
        except ValueError as e:
            return str(e)
        return None

    blamed = [repr(text) for text in dict.fromkeys(overrides) if error_without(text) != error]
    return f"override{'s' * (len(blamed) > 1)} {' and '.join(blamed)}" if blamed else ""


def _map_texts(values, change: Callable[[str], str]):
    """Nested values with every text that is no key changed."""
    if isinstance(values, dict):
        return {key: _map_texts(value, change) for key, value in values.items()}
    if isinstance(values, list):
        return [_map_texts(value, change) for value in values]
    return change(values) if isinstance(values, str) else values


def escape(text: str) -> str:
    """As omegaconf has to read it: a text with `${` means itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _refuse_reference(text: str) -> str:
    if re.search(r"(?<!\\)(\\\\)*\$\{", text):  # an odd number of backslashes would take its meaning
        raise ValueError(
            f"{text!r} refers to another value, which nothing in a run folder does; was it changed by hand?"
        )
    return text


def _refuse_aliases(path: Path) -> None:
    """A few lines of aliases of aliases stand for more values than any memory holds."""
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(path.read_bytes(), Loader=yaml.SafeLoader)):
        raise ValueError("it has a YAML alias, which nothing in a run folder has; was it changed by hand?")


def _read(path: Path, included_from: tuple[Path, ...] = (), references: bool = True) -> dict:
    """The file with its includes merged under it; references stay as they are written."""
    from omegaconf import OmegaConf

    where = f" (included from {included_from[-1]})" if included_from else ""
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}{where}{_near_files(path)}")
    if path.resolve() in [p.resolve() for p in included_from]:
        raise ValueError(f"{path} includes itself: {' -> '.join(str(p) for p in (*included_from, path))}")
    try:
        if not references:
            _refuse_aliases(path)
        own = OmegaConf.load(path)
    except Exception as e:
        raise ValueError(f"{path} is not valid YAML: {_one_line(e)}") from e
    if not OmegaConf.is_dict(own):
        raise ValueError(f"{path} must hold `key: value` lines at its top level")
    includes = OmegaConf.to_container(OmegaConf.create({"names": own.pop("include", None)}))["names"] or []
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ValueError(f"{path}: include is {includes!r}; it must be a list of file names")
    if includes and not references:
        raise ValueError(f"{path} includes {includes[0]}, and no file of a run folder does; was it changed by hand?")
    parts = [_read(path.parent / name, (*included_from, path)) for name in includes]
    try:
        return OmegaConf.to_container(OmegaConf.merge(*parts, own))
    except Exception as e:
        raise ValueError(f"{path}: {_one_line(e)}: a list and a group of keys do not go over one another") from e


def upgraded(values: dict) -> dict:
    """Values of an older version as the newest one says them: the same model, whatever the defaults are now."""
    if values.get("version") not in (1, 2):
        return values
    model = values.get("model", {})
    model = model | {"mac": {"residual": False} | model.get("mac", {})}
    if values["version"] == 2:
        return values | {"version": CONFIG_VERSION, "model": model}
    memory = {"step": "plain", "max_lr": 0.1} | model.get("memory", {}) | {"damping": 0.0}
    if memory["step"] == "telescoped":
        if memory.get("residual_norm", True):
            raise ValueError(
                "model.memory.step=telescoped with residual_norm was another step in version 1, which this titans-pretrain does not "
                "have; train with the one that wrote it, or anew without `version: 1`"
            )
        memory["step_coefficient"] = 2.0
    return values | {"version": CONFIG_VERSION, "model": model | {"memory": memory}}


def _check_keys(values: dict, cls: type, at: tuple[str, ...], schema: type) -> None:
    """Refuses a key that `cls` does not have, naming the nearest one of the whole schema."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(unknown_key(".".join((*at, str(key))), hints, schema))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{'.'.join((*at, key))} = {value!r}: must be a group of keys")
            _check_keys(value, hints[key], (*at, key), schema)


def _explain(error: dict, schema: type) -> str:
    """One line for a pydantic error."""
    if error["type"] == "value_error":  # raised by a __post_init__, which names its key
        return str(error["ctx"]["error"])
    hint = schema
    for part in error["loc"]:
        hint = typing.get_type_hints(hint)[part] if dataclasses.is_dataclass(hint) else None
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    told = error["msg"].removeprefix("Input should be ")
    legal = " or ".join(_KIND_NAMES.get(kind) or _choices(kind) or told for kind in kinds)
    return f"{'.'.join(map(str, error['loc']))} = {error['input']!r}: must be {legal}"


_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    type(None): "null",
}


def _choices(kind) -> str:
    return " or ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else ""


def _near_files(path: Path) -> str:
    """Files beside a missing one (or in configs/) whose names look like it."""
    folders = dict.fromkeys(f for f in (path.parent, Path("configs"), Path("configs/model")) if f.is_dir())
    names = {str(f): f.stem for folder in folders for f in sorted(folder.glob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, names.values(), n=3, cutoff=0.5)
    found = list(dict.fromkeys(p for n in near for p, stem in names.items() if stem == n))
    if found:
        return f"; near names: {', '.join(found)}"
    if path.suffix != ".yaml":
        return f"; by name there are {', '.join(shipped_names())}"
    return f"; {path.parent} holds {', '.join(list(names)[:8])}" if names else ""


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
