"""Names of earlier releases, misspelt names, sizes without quotation marks, and the completion of a shell."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shutil
import subprocess

import pytest

from emo_megatron import cli
from emo_megatron.arguments import (
    RENAMED_COMMANDS,
    RENAMED_FLAGS,
    RENAMED_VALUES,
    current_arguments,
    new_command,
    suggest_flags,
)
from emo_megatron.commands import place, retention, select, stats
from emo_megatron.experts.selection import load_selection

COMMANDS_OF = {"stats": stats, "select": select, "retention": retention, "place": place}


def renamed(command: str, *arguments: str) -> list[str]:
    return current_arguments(command, arguments, COMMANDS_OF[command].Options)


@pytest.mark.parametrize("old", RENAMED_FLAGS)
def test_an_old_flag_is_the_new_one_and_warns_once(old, capsys):
    new = RENAMED_FLAGS[old]
    assert renamed("retention", old, "5") == [new, "5"]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert old in warning
    assert new in warning
    # with an equals sign, and in the spelling of Python
    assert renamed("retention", f"{old.replace('-', '_').replace('__', '--')}=--x") == [f"{new}=--x"]
    assert renamed("retention", new, "5") == [new, "5"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("old", RENAMED_FLAGS)
def test_old_and_new_together_are_an_error(old):
    new = RENAMED_FLAGS[old]
    for arguments in ((old, "5", new, "5"), (f"{new}=5", f"{old}=5")):
        with pytest.raises(ValueError, match=f"{old} .*{new}"):
            renamed("retention", *arguments)


def test_new_names_are_flags_of_commands_and_old_ones_are_not():
    names = {
        f"--{field.name.replace('_', '-')}"
        for command in COMMANDS_OF.values()
        for field in dataclasses.fields(command.Options)
    }
    assert set(RENAMED_FLAGS.values()) <= names
    assert not names & RENAMED_FLAGS.keys()
    assert set(RENAMED_COMMANDS.values()) <= cli.COMMANDS.keys()
    assert not RENAMED_COMMANDS.keys() & cli.COMMANDS.keys()


def test_old_commands_and_values_are_read(capsys):
    assert new_command("relabel", cli.COMMANDS) == "reorder"
    ((command, flag, old),) = RENAMED_VALUES
    assert renamed(command, flag, old, "--ranks", old) == [flag, "coactivation", "--ranks", old]
    assert renamed(command, f"{flag}={old}") == [f"{flag}=coactivation"]
    assert capsys.readouterr().err.count("warning: ") == 3


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["xselect", "--keep", "50%"], "select"),
        (["statistics"], "stats"),
        (["extrct"], "extract"),
        (["select", "--kep", "50%", "--output", "o"], "--keep"),
        (["select", "--max-loss=1%"], "--max-loss-increase"),
        (["stats", "--micro-batchsize", "2"], "--micro-batch-size"),
        (["extract", "--selecton", "s"], "--selection"),
    ],
)
def test_a_misspelt_name_is_one_line_with_the_nearest(arguments, suggested, capsys):
    assert cli.main(arguments) == 2
    # what Megatron prints when it is imported comes before
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"did you mean {suggested}?" in line


def test_bridge_takes_pools_as_fields_of_the_model(capsys):
    assert cli.main(["bridge", "--recipe", "r", "--pool-min-start", "8"]) == 2
    assert "bridge has no flag --pool-min-start, give model.pool_min_start=VALUE;" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["xyz"], ["select", "--xyzxyz"], ["extract", "--rows", "2"]])
def test_a_name_like_no_other_is_one_line_too(arguments, capsys):
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "did you mean" not in line
    assert arguments[-2 if "--rows" in arguments else -1] in line


def test_a_parser_of_megatron_names_the_nearest_flag(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--pool-min", type=int)
    suggest_flags(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--pool-mn", "8", "--other=--pool"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("--pool-mn, did you mean --pool-min?")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--pool-min", "x"])
    assert "did you mean" not in capsys.readouterr().err


def test_a_number_of_routed_experts_needs_no_quotation_marks():
    quoted = ["--keep", "50%", "8 routed", "4 routed", "--cross-sizes=8 routed", "--name", "8", "--compare", "routed"]
    bare = " ".join(quoted).split(" ")
    assert renamed("retention", *bare) == renamed("retention", *quoted) == quoted
    assert renamed("retention", "--name", "8", "routed") == ["--name", "8", "routed"]


def test_nothing_is_renamed_after_two_dashes():
    after = ["--", "--rows", "--micro-batch-size", "8", "routed"]
    assert renamed("stats", "--rows", "2", *after) == ["--micro-batch-size", "2", *after]


def test_what_options_cannot_be_is_one_line(capsys):
    assert cli.main(["select", "--stats", "s", "--keep", "8", "--output", "o"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --keep ")
    assert '"7 routed"' in line


def test_an_old_selection_keeps_its_meaning(tmp_path):
    """Selections list experts and name no size, so that the first format means today what it meant."""
    text = """{"format": "emo_megatron.selection.1", "num_experts": 8, "experts": [[0, 3], [1, 7]], "layers": [1, 2],
        "method": "mean_prob", "seed": null, "model": "beef", "data": {"max_rise": "1%", "losses": {"2": 3.5}},
        "created_by": "emo_megatron 0.1.0"}"""
    path = tmp_path / "old.json"
    path.write_text(text)
    selection = load_selection(path)
    assert selection.experts == ((0, 3), (1, 7))
    assert selection.num_kept == (2, 2)
    assert selection.save(tmp_path / "new.json").read_text().startswith('{\n "format": "emo_megatron.selection.1"')


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example_and_no_bare_none(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert "{None}" not in text
    assert "(default: None)" not in text
    examples = [line for line in text.splitlines() if re.match(rf" *(torchrun .*)?emo_megatron {command} -", line)]
    assert examples or command == "env"


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "emo_megatron"
    with pytest.raises(SystemExit):
        cli.main(["--tyro-write-completion", "bash", str(path)])
    return path


def test_a_description_is_one_line(completion):
    """bash would offer the words of a second line as completions."""
    (spec,) = re.findall(r"^COMPLETION_SPEC = (.*)$", completion.read_text(), flags=re.MULTILINE)
    commands = ast.literal_eval(spec)["subcommands"]
    assert commands.keys() == cli.COMMANDS.keys()
    for name, command in commands.items():
        for option in command["options"]:
            assert "\n" not in option["description"], (name, option["flags"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("mer", {"merge", "merge-stats"}),
        ("select --max", {"--max-loss-increase"}),
        ("export --format ", {"qwen2_moe", "emo", "gguf"}),
        ("place --method ", {"coactivation", "load"}),
    ],
)
def test_bash_completes_commands_flags_and_values(completion, words, found):
    function = re.search(r"complete .*-F (\S+)", completion.read_text())[1]
    script = f"""source {completion}
        COMP_WORDS=(emo_megatron {words}{'""' if words.endswith(" ") else ""})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="emo_megatron {words}"; COMP_POINT=${{#COMP_LINE}}
        {function} emo_megatron "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) == found
