"""Was an adapter trained on the weights of this folder? The adapter's fingerprint and path must say so."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emo_megatron.hf.config_file import RECORD, record
from emo_megatron.hf.fingerprint import FIELD
from emo_megatron.hf.folder import CONFIG as MODEL_CONFIG
from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.json_files import read_object

CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"
"""Field of CONFIG with the model that the adapter was trained on."""


def configuration(adapter: Path) -> Mapping[str, Any]:
    """The content of CONFIG in the folder of an adapter; ValueError for a damaged file."""
    return read_object(adapter / CONFIG, kind="the configuration of an adapter")


def check_base(base: HuggingFaceFolder, adapter: Path) -> None:
    """Raise ValueError unless the adapter was trained on the weights of `base`, as far as its folder says."""
    copied = adapter / MODEL_CONFIG
    trained_on = _recorded(copied) if copied.is_file() else None
    if trained_on is None:
        _check_named(base, adapter)
        return
    if trained_on == base.fingerprint:
        named = configuration(adapter).get(BASE)
        # programs that train all weights copy the record, so the adapter's can be about earlier weights of that folder
        if isinstance(named, str) and _recorded_in(named) == trained_on:
            _check_named(base, adapter)
        return
    if trained_on == record(base.config, RECORD).get(FIELD):
        raise ValueError(
            f"{RECORD}.{FIELD} in {base.path / MODEL_CONFIG} must be the fingerprint of the weights in the folder; "
            f"another program has written the weights. If the adapter {adapter} was trained on the weights that are "
            f"there now, delete the field in this file and in {copied}"
        )
    raise ValueError(
        f"{adapter} was trained on other weights than those in --folder {base.path}: {RECORD}.{FIELD} in "
        f"{copied} must be {base.fingerprint[:12]}...; got {reprlib.repr(trained_on)}: pass the folder that "
        "the adapter was trained on as --folder"
    )


def _check_named(base: HuggingFaceFolder, adapter: Path) -> None:
    """Raise ValueError unless BASE names `base` or a folder with the same weights."""
    named = configuration(adapter).get(BASE)
    try:
        is_same = _is_same(named, base)
    except ValueError as error:
        raise ValueError(
            f"{adapter / CONFIG}: {BASE} names a folder that cannot be compared with --folder {base.path}: {error}; or "
            f"write the path of the folder that the adapter was trained on into {BASE}"
        ) from None
    if not is_same:
        raise ValueError(
            f"{adapter / CONFIG}: {BASE} must be --folder {base.path}, or a folder with the same weights; got "
            f"{reprlib.repr(named)}: pass the folder that the adapter was trained on as --folder, or, if {base.path} "
            f"has the same weights as that folder, write its path into {BASE}"
        )


def _recorded(config: Path) -> object:
    """The fingerprint in a config.json; None without."""
    fields = read_object(config, kind="the configuration of the model that an adapter was trained on")
    return record(fields, RECORD).get(FIELD)


def _recorded_in(folder: str) -> object:
    """The fingerprint in the config.json of a folder; None if there is none to read."""
    try:
        return _recorded(Path(folder, MODEL_CONFIG))
    except (OSError, ValueError):
        return None


def _is_same(named: object, base: HuggingFaceFolder) -> bool | None:
    """Whether a path names the folder of `base`, or a folder with the same weights; None if it names no folder here."""
    if not isinstance(named, str):
        return None
    path = Path(named)
    try:
        if path.resolve() == base.path.resolve():
            return True
        is_folder = (path / MODEL_CONFIG).is_file()
    except (OSError, ValueError):
        # a name that no file can have
        return None
    return HuggingFaceFolder(path).fingerprint == base.fingerprint if is_folder else None
