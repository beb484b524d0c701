"""emo_megatron.environment: the report says what is there and survives what is broken."""

import importlib.metadata
import os
import sys
import types
from pathlib import Path

import pytest
from torch.utils import collect_env

import emo_megatron
from emo_megatron import environment
from emo_megatron.environment import collect_environment, format_text


def test_the_install_hint_names_a_heading_of_a_page() -> None:
    page, section = environment.BRIDGE_INSTALL.removeprefix("see ").split(", section ")
    headings = (Path(__file__).parents[1] / page).read_text().splitlines()
    assert f"## {section}" in headings


@pytest.fixture(autouse=True)
def _quick_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Driver Version: 550.1 \ngcc 12.2\nrelease 13.0, V13.0.88"
    monkeypatch.setattr(collect_env, "run", lambda command: (0, said, ""))


def test_reports_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_DEVICE", "cpu")
    report = collect_environment()
    assert report["emo_megatron"] == emo_megatron.__version__
    assert report["versions"]["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert report["versions"]["python"]["is_supported"]
    assert report["versions"]["torch"]["version"].startswith(importlib.metadata.version("torch")[:4])
    assert report["versions"]["torch"]["version"].endswith(" build)")
    assert report["versions"]["transformers"]["version"] == importlib.metadata.version("transformers")
    assert report["backends"]["reference"] == ""
    assert report["variables"] == {k: v for k, v in os.environ.items() if k.startswith("EMO_")}
    assert (report["driver"], report["compiler"], report["nvcc"]) == ("550.1", "12.2", "13.0.88")


def test_text_has_a_line_a_fact_and_says_what_is_not_supported() -> None:
    report = collect_environment()
    old = environment._judge("megatron-core", "0.16.1")
    report["versions"]["megatron-core"] = old
    report |= {"backends": {"reference": "", "native": "not built"}, "gpus": []}
    lines = format_text(report).splitlines()
    metadata = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines}
    assert metadata["megatron-core"] == "0.16.1 (NOT SUPPORTED, requires >=0.18, <0.20)"
    assert metadata["python"].endswith("(supported >=3.12, <3.14)")
    assert metadata["reference ops"] == "available"
    assert metadata["native ops"] == "not available: not built"
    assert metadata["gpu"] == "none"


@pytest.mark.parametrize(
    ("name", "version", "is_supported"),
    [
        ("python", "3.13.1", True),
        ("python", "3.14.0", False),
        ("transformers", "5.24.0", True),
        ("torch", "2.11.0a0+50e2f1", True),
        ("torch", "2.10.1", False),
        ("megatron-core", "0.19.2", True),
        ("megatron-core", "0.20.0rc1", False),
        ("megatron-core", "not installed", False),
        ("apex", "not installed", True),
        ("megatron-bridge", "0.6.2", True),
        ("megatron-bridge", "0.7.0", False),
        ("megatron-bridge", "not installed", True),
    ],
)
def test_judges_versions(name: str, version: str, is_supported: bool) -> None:
    assert environment._judge(name, version)["is_supported"] is is_supported


def test_survives_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        if distribution == "apex":
            raise TypeError("metadata without a version")
        raise importlib.metadata.PackageNotFoundError(distribution)

    broken_torch = types.ModuleType("torch")
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "torch", broken_torch)
    monkeypatch.setitem(sys.modules, "emo_megatron.ops", types.ModuleType("emo_megatron.ops"))
    report = collect_environment()
    assert report["versions"]["apex"]["version"].startswith("broken metadata")
    assert report["versions"]["torch"]["version"].startswith("does not load")
    assert not report["versions"]["torch"]["is_supported"]
    assert "does not load" in report["backends"]["reference"]


def test_survives_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert collect_environment()["gpus"] == []


def test_tools_that_fail_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "run", lambda command: (127, "", "not found"))
    report = collect_environment()
    assert report["versions"]["torch"]["is_supported"]
    assert {report["driver"], report["compiler"], report["nvcc"]} == {"not found"}
