"""YAML files that compose + dotted overrides -> a checked `Config`, and back.

A file may name others under `include:` (paths relative to itself). They are merged in order, then the file itself,
then the overrides: later wins, key by key.
"""

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path

from titans_pretrain.config.schema import CONFIG_VERSION, Config
from titans_pretrain.config.shipped import find_config, shipped_names


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Config of a YAML file with `key=value` overrides, e.g. load_config("configs/tiny.yaml", ["model.variant=mac"]).

    Raises FileNotFoundError for a missing file and ValueError for everything else that is wrong, both with one line that
    names the key, the value and what is legal.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_config(path)
    try:
        merged = OmegaConf.merge(_read(path), _parse_overrides(overrides))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError) as e:
        told = f"{path}: {_first_line(e)}"
        if isinstance(e, TypeError) or "ListConfig" in told:  # a list meets a mapping, as omegaconf 2.4 and 2.3 say it
            told += ": an override cannot reach into a list, give all of it, as 'model.pattern=[mag, lmm]'"
        raise ValueError(told) from e
    try:
        config = from_dict(values)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    config.run.name = config.run.name or path.stem
    config.run.dir = config.run.dir or f"runs/{config.run.name}"
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Writes every key with its value, so that `load_config(path)` gives the same config."""
    import yaml

    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def from_dict(values: dict) -> Config:
    """Checked config of nested dicts. Types are strict: 4 is a float where one is wanted, "4" is no int."""
    from pydantic import TypeAdapter, ValidationError

    values = _upgrade(values)
    _check_keys(values, Config, ())
    try:
        # As JSON, because in strict mode only JSON input may give a dict for a dataclass.
        return TypeAdapter(Config).validate_json(json.dumps(values), strict=True)
    except ValidationError as e:
        raise ValueError(_explain(e.errors()[0])) from e
    except TypeError as e:
        raise ValueError(f"a value has a type that no key takes: {e}") from e


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


def _read(path: Path, included_from: tuple[Path, ...] = ()):
    """The file with its includes merged under it, as an OmegaConf DictConfig."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = f" (included from {included_from[-1]})" if included_from else ""
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}{where}{_near_files(path)}")
    if path.resolve() in [p.resolve() for p in included_from]:
        raise ValueError(f"{path} includes itself: {' -> '.join(str(p) for p in (*included_from, path))}")
    try:
        own = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid YAML: {_one_line(e)}") from e
    if not OmegaConf.is_dict(own):
        raise ValueError(f"{path} must hold `key: value` lines at its top level")
    includes = OmegaConf.to_container(OmegaConf.create({"names": own.pop("include", None)}))["names"] or []
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ValueError(f"{path}: include is {includes!r}; it must be a list of file names")
    parts = [_read(path.parent / name, (*included_from, path)) for name in includes]
    return OmegaConf.merge(*parts, own)


def _parse_overrides(overrides: typing.Sequence[str]):
    import yaml
    from omegaconf import OmegaConf

    parsed = []
    for text in overrides:
        if not all(text.partition("=")[:2]):
            raise ValueError(f"override {text!r} is not of the form key=value, e.g. train.lr=1e-3")
        try:
            parsed.append(OmegaConf.from_dotlist([text]))
        except yaml.YAMLError as e:
            raise ValueError(f"the value of override {text!r} is not valid YAML: {_one_line(e)}") from e
    return OmegaConf.merge(*parsed) if parsed else OmegaConf.create()


def _upgrade(values: dict) -> dict:
    """Values of an older version as the newest one says them: the same model, whatever the defaults are now."""
    version = values.get("version", CONFIG_VERSION)
    if isinstance(version, int) and version > CONFIG_VERSION:
        raise ValueError(
            f"version {version} is newer than version {CONFIG_VERSION}, the newest this titans-pretrain reads; update titans-pretrain"
        )
    if version != 1:
        return values
    model = values.get("model") or {}
    memory = {"step": "plain", "max_lr": 0.1} | (model.get("memory") or {}) | {"damping": 0.0}
    if memory["step"] == "telescoped":
        if memory.get("residual_norm", True):
            raise ValueError(
                "model.memory.step=telescoped with residual_norm was another step in version 1, which this titans-pretrain does not "
                "have; train with the one that wrote it, or anew without `version: 1`"
            )
        memory["step_coefficient"] = 2.0
    return values | {"version": CONFIG_VERSION, "model": model | {"memory": memory}}


def _check_keys(values: dict, cls: type, at: tuple[str, ...]) -> None:
    """Refuses a key that `cls` does not have, naming the nearest one of the whole schema."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown_key(".".join((*at, str(key))), hints))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{'.'.join((*at, key))} = {value!r}: must be a group of keys")
            _check_keys(value, hints[key], (*at, key))


def _unknown_key(key: str, siblings: typing.Iterable[str]) -> str:
    """Nearest by the whole dotted name, or by the last part alone, so that train.seq_len finds data.seq_len."""
    legal = _legal_keys(Config)
    last = key.rpartition(".")[2]
    same_name = [k for k in legal if k.rpartition(".")[2] == last]
    near = same_name or difflib.get_close_matches(key, legal, n=1, cutoff=0.6)
    if not near:
        by_name = {k.rpartition(".")[2]: k for k in legal}
        near = [by_name[n] for n in difflib.get_close_matches(last, by_name, n=1, cutoff=0.6)]
    return f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"legal here: {', '.join(siblings)}")


def _legal_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys += _legal_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def _explain(error: dict) -> str:
    """One line for a pydantic error."""
    if error["type"] == "value_error":  # raised by a __post_init__, which names its key
        return str(error["ctx"]["error"])
    hint = Config
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


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
