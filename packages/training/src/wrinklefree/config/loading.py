"""`load_config`: Hydra composes the YAML of a run over the schema; every mistake is one line.

    load_config(["model=tiny_llama", "training=unified", "training.max_steps=100"])

Groups are folders of `wrinklefree/configs`; a key stands on the command line, in the YAML of a group, or has
its default in `schema.py`. An error names the key, where it was written, what was found and what is accepted.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from durable import UserError
from wrinklefree.config.describe import accepted
from wrinklefree.config.gpu import fit_to_gpu
from wrinklefree.config.schema import RunConfig, TeacherConfig
from wrinklefree.masking import masked
from wrinklefree.objectives.factory import (
    checked_objectives,
    create_curriculum_scheduler,
    create_objective,
)

CONFIG_DIR = Path(__file__).parents[1] / "configs"
OPEN_KEYS = ("training.objectives.", "gpu.micro_batches.")
"""Below the first, each objective has keys of its own and checks them itself; below the other are models."""
GROUPS = ("model", "training", "data", "distributed", "gpu", "experiment")
OTHER_NAMES = {
    "training.gradient_clipping": "training.gradient_clipping.max_norm",
    "resume.checkpoint_path": "training.resume.checkpoint_path",
}
"""Keys that older command lines use, and ours."""


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a run; UserError (exit code 2) for whatever is wrong with it."""
    overrides = [_in_our_words(each) for each in overrides]
    composed = _composed(overrides)
    try:
        fit_to_gpu(composed, {each.lstrip("+").partition("=")[0] for each in overrides})
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise _bad_value(error, overrides) from None
    except RecursionError:
        raise UserError("configuration: refers to itself", fix="remove the circular interpolation") from None
    except UserError as error:
        raise _with_place(error, overrides) from None
    assert isinstance(config, RunConfig)
    curriculum = create_curriculum_scheduler(config.training.curriculum, config.max_steps)
    wanted = checked_objectives(config.training.objectives, curriculum)
    if curriculum is not None:
        _refuse_weights(overrides)
    _require_teacher_can(config.training.teacher, wanted)
    return config


def _refuse_weights(overrides: Sequence[str]) -> None:
    """UserError for a weight that a person wrote and the phases of a curriculum would overrule."""
    for each in overrides:
        key, _, value = each.lstrip("+").partition("=")
        if key.startswith("training.objectives.") and key.endswith(".weight"):
            raise UserError(
                f"{key}: the curriculum's phases say how much it counts",
                value,
                "set training.curriculum.enabled=false, or the weights in training.curriculum.phases",
            )


def _require_teacher_can(teacher: TeacherConfig, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError for an objective that looks into a teacher which tells its most probable tokens alone."""
    if teacher.knows_inside:
        return
    for name, options in wanted.items():
        if create_objective(name, options).needs().needs_inside:
            how = (
                f"cache={teacher.cache}" if teacher.cache is not None else f"backend={teacher.backend.value}"
            )
            raise UserError(
                f"objectives.{name}: needs hidden states or attention of the teacher",
                f"training.teacher.{how}, which has the most probable tokens alone",
                f"let the teacher run here without a cache, or set training.objectives.{name}.weight=0",
            )


def _in_our_words(override: str) -> str:
    key, sign, value = override.partition("=")
    # Objectives are chosen by naming them: `training.objectives.logits_distill.weight=1` may add one.
    if key.startswith(OPEN_KEYS):
        return f"++{override}"
    if key.startswith("+") and key[1:] in GROUPS:
        return override[1:]
    return f"{OTHER_NAMES.get(key, key)}{sign}{value}"


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, secrets masked."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as json takes it, to write down and to compare: secrets are masked."""
    return {item.name: masked(_plain(getattr(config, item.name)), item.name) for item in fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def group_options(group: str) -> list[str]:
    """The YAML files of a group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def schema_keys(
    kind: type = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(key, type, field) of every leaf of the schema."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from schema_keys(hint, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hint, item


@cache
def _store_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def _composed(overrides: list[str]) -> DictConfig:
    _store_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            return compose("config", overrides=overrides)
    except RecursionError:
        raise UserError("configuration: refers to itself", fix="remove the alias or interpolation") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _bad_override(error, overrides) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
        raise UserError(f"{where}: is not YAML", getattr(error, "problem", None)) from None
    finally:
        GlobalHydra.instance().clear()


def _bad_override(error: Exception, overrides: list[str]) -> UserError:
    """What Hydra could not compose."""
    for override in overrides:
        key, sign, value = override.lstrip("+~").partition("=")
        if not sign:
            return UserError("command line: an override is KEY=VALUE", override)
        if key in GROUPS and value not in (options := group_options(key)):
            return UserError(f"{key}: no such choice", value, choices=options)
    keys = [key for key, _, _ in schema_keys()]
    known = set(keys) | {key.rpartition(".")[0] for key in keys} | set(GROUPS)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key not in known and not key.startswith(OPEN_KEYS):
            return _unknown_key(key)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return _bad_value(cause, overrides)


def _unknown_key(key: str) -> UserError:
    """Keys as deep as the one that was written come into question first."""
    leaves = [name for name, _, _ in schema_keys()]
    depth = key.count(".") + 1
    alike = dict.fromkeys(
        ".".join(leaf.split(".")[:depth]) for leaf in leaves if leaf.count(".") + 1 >= depth
    )
    return UserError("unknown key", key, choices=alike or leaves)


def _bad_value(error: Exception, overrides: list[str]) -> UserError:
    """A value of the wrong type, a key that the schema lacks, an interpolation that leads nowhere."""
    key = getattr(error, "full_key", None) or ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    what = lines[0].rstrip(".")
    keys = [name for name, _, _ in schema_keys()]
    if "not in" in what and "struct" not in what and key and key not in keys:
        return _with_place(_unknown_key(key), overrides)
    if key and key not in keys and not key.startswith(OPEN_KEYS) and "nterpolation" not in what:
        return _with_place(_unknown_key(key), overrides)
    return _with_place(UserError(f"{key}: {what}" if key else what, fix=_accepted(key)), overrides)


def _accepted(key: str) -> str | None:
    for name, hint, _ in schema_keys():
        if name == key:
            return f"give {accepted(hint)}"
    return None


def _with_place(error: UserError, overrides: list[str]) -> UserError:
    """The same error, with the file and line that the value came from."""
    key = error.what.partition(":")[0]
    place = _place_of(key, overrides)
    if place is None:
        return error
    what = f"{error.what} ({place})"
    return UserError(what, error.found, error.fix, error.exit_code, error.choices)


def _place_of(key: str, overrides: list[str]) -> str | None:
    """Where a key was last written: on the command line, or in the YAML of a chosen group."""
    chosen = {}
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        if name == key:
            return "on the command line"
        chosen[name] = value
    group, _, rest = key.partition(".")
    for folder, path_in_file in ((group, rest), ("experiment", key)):
        options = group_options(folder) if folder in GROUPS else []
        names = (
            [chosen[folder]] if chosen.get(folder) in options else ([] if folder == "experiment" else options)
        )
        for name in names:
            path = CONFIG_DIR / folder / f"{name}.yaml"
            line = _line_of(path, path_in_file.split(".")) if path_in_file else None
            if line is not None and (len(names) == 1):
                return f"{path.name}:{line}"
    return None


def _line_of(path: Path, keys: list[str]) -> int | None:
    """The line of a key in a YAML file, from 1."""
    node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    for depth, wanted in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            return None
        for name, value in node.value:
            if name.value == wanted:
                if depth == len(keys) - 1:
                    return int(name.start_mark.line) + 1
                node = value
                break
        else:
            return None
    return None
