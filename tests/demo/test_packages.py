"""demo/packages.py: from made-up packages to a packed corpus; what is there is not made again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.fake_apt import FakeApt, make_apt

from demo import apt, package_texts, packages
from demo.corpus import CorpusConfig, split_documents
from demo.package_texts import DOMAINS, Domain, is_in_language, strip_menus, text_of_html
from demo.packages import Options
from demo.sources import split_long

ROOT = Path(__file__).resolve().parents[2]
ALPHABETS = {"latin": "abcdefgh", "greek": "αβγδεζηθ", "digits": "01234567"}
MADE_UP = tuple(
    Domain(name=name, patterns=(rf"{name}-\d+-src", f"{name}-doc"), files=r"\.txt$", skip="/skipped/")
    for name in ALPHABETS
)

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")


def _words(alphabet: str, seed: str, count: int = 400) -> str:
    rng = random.Random(seed)
    words = ("".join(rng.choices(alphabet, k=rng.randint(2, 7))) for _ in range(count))
    return " ".join(words)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an apt with packages of three alphabets."""
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("apt")
    made = make_apt(folder)
    for name, alphabet in ALPHABETS.items():
        texts = {f"usr/{name}{n}.txt": _words(alphabet, f"{name} {n}") for n in range(70)}
        texts["usr/skipped/no.txt"] = _words(alphabet, "skipped")
        texts["usr/copy.txt"] = texts[f"usr/{name}0.txt"]
        made.add(f"{name}-12-src", texts, version="1:2.0-1")
    return folder


def _use(made: FakeApt, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    monkeypatch.setenv("PATH", f"{made.tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(made.state))
    monkeypatch.setattr(packages, "DOMAINS", MADE_UP)
    return made


@pytest.fixture
def fake(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    """A copy of that apt, first in PATH."""
    shutil.copytree(built, tmp_path / "apt")
    return _use(FakeApt(tools=tmp_path / "apt" / "tools", state=tmp_path / "apt" / "state"), monkeypatch)


def _options(tmp_path: Path, **more: object) -> Options:
    given: dict[str, object] = {"megabytes": 0.3, "vocab_size": 300, "min_domains": 3, "min_tokens": 0.01}
    return Options(output=tmp_path / "out", **(given | more))  # type: ignore[arg-type]


def _times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@needs_dpkg
def test_packages_become_a_packed_corpus_once(
    fake: FakeApt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("latin-9-src", {"usr/old.txt": _words("xyz", "old")})
    packages.main(_options(tmp_path))
    out = tmp_path / "out"
    assert sorted(fake.calls) == ["digits-12-src", "greek-12-src", "latin-12-src"]
    said = capsys.readouterr().out
    assert "to download into" in said.splitlines()[0]
    assert f"{out}/corpus.tar.xz: " in said
    texts = [path.read_text() for path in (out / "texts" / "latin").rglob("*.txt")]
    # neither the copy nor what is skipped
    assert sorted(texts) == sorted(_words(ALPHABETS["latin"], f"latin {n}") for n in range(70))
    manifest = json.loads((out / "corpus" / "corpus.json").read_text())
    assert [row["source"] for row in manifest["domains"].values()] == [
        f"{name}-12-src 1:2.0-1" for name in sorted(ALPHABETS)
    ]
    before = _times(out)
    packages.main(_options(tmp_path))
    assert _times(out) == before
    assert len(fake.calls) == 3
    assert sorted(path.name for path in out.iterdir()) == ["corpus", "corpus.tar.xz", "debs", "texts"]
    # another size of the texts
    packages.main(_options(tmp_path, megabytes=0.11))
    assert len(fake.calls) == 3
    # as few files as a domain needs
    assert len(list((out / "texts" / "latin").rglob("*.txt"))) == 60


@needs_dpkg
def test_other_packages_give_another_corpus(fake: FakeApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("more-12-src", {f"usr/{n}.txt": _words("stuvwxyz", f"more {n}") for n in range(70)})
    monkeypatch.setattr(
        packages, "DOMAINS", (*MADE_UP, Domain(name="more", patterns=(r"more-\d+-src",), files=r"\.txt$"))
    )
    packages.main(_options(tmp_path))
    manifest = tmp_path / "out" / "corpus" / "corpus.json"
    earlier = json.loads(manifest.read_text())
    texts = {f"usr/latin{n}.txt": _words(ALPHABETS["latin"], f"newer {n}") for n in range(70)}
    fake.add("latin-13-src", texts, version="1:3.0-1")
    packages.main(_options(tmp_path))
    later = json.loads(manifest.read_text())
    # the configuration of the corpus names no package
    assert later["config"] == earlier["config"]
    assert later["domains"]["latin"]["source"] == "latin-13-src 1:3.0-1"
    assert later["fingerprint"] != earlier["fingerprint"]
    # a domain that is gone
    monkeypatch.setattr(packages, "DOMAINS", MADE_UP)
    packages.main(_options(tmp_path))
    assert [*json.loads(manifest.read_text())["domains"]] == sorted(ALPHABETS)


@needs_dpkg
def test_an_interrupted_download_resumes(fake: FakeApt, tmp_path: Path) -> None:
    found = apt.find_packages([rf"{name}-\d+-src" for name in ALPHABETS])
    wanted = list(found.values())
    (fake.state / f"fails-{wanted[1].name}").touch()
    with pytest.raises(ValueError, match="apt-get failed: E: no route"):
        apt.download(wanted, tmp_path / "debs")
    assert apt.missing_packages(wanted, tmp_path / "debs") == wanted[1:]
    (fake.state / f"fails-{wanted[1].name}").unlink()
    apt.download(wanted, tmp_path / "debs")
    assert fake.calls == [wanted[n].name for n in (0, 1, 1, 2)]
    assert len(list((tmp_path / "debs").iterdir())) == 3
    # a file with other bytes is not taken
    deb = next((tmp_path / "debs").glob(f"{wanted[0].name}*"))
    deb.write_bytes(b"x" * deb.stat().st_size)
    assert apt.missing_packages(wanted, tmp_path / "debs") == wanted[:1]


@needs_dpkg
def test_a_package_with_another_hash_is_an_error(fake: FakeApt, tmp_path: Path) -> None:
    (package,) = apt.find_packages(["latin-12-src"]).values()
    deb = next((fake.state / "store").glob("latin*"))
    deb.write_bytes(deb.read_bytes()[:-1])
    with pytest.raises(ValueError, match="apt-get update"):
        apt.download([package], tmp_path / "debs")
    assert list((tmp_path / "debs").iterdir()) == []


@needs_dpkg
def test_too_few_domains_are_an_error_before_the_download(
    fake: FakeApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = Domain(name="klingon", patterns=("klingon-doc",), files="")
    monkeypatch.setattr(packages, "DOMAINS", (*MADE_UP, more))
    with pytest.raises(ValueError, match="--min-domains requires 4 domains; apt has packages for 3") as error:
        packages.main(_options(tmp_path, min_domains=4))
    assert "apt-get update" in str(error.value)
    assert "klingon: not available, apt has none of the packages klingon-doc" in capsys.readouterr().out
    assert fake.calls == []
    assert not (tmp_path / "out").exists()


@needs_dpkg
def test_a_corpus_too_large_for_the_file_loses_documents_evenly(
    fake: FakeApt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages.main(_options(tmp_path))
    size = (tmp_path / "out" / "corpus.tar.xz").stat().st_size / packages.MIB
    whole = json.loads((tmp_path / "out" / "corpus" / "corpus.json").read_text())
    packages.main(_options(tmp_path, max_mib=0.8 * size))
    assert "training documents are dropped evenly" in capsys.readouterr().out
    assert (tmp_path / "out" / "corpus.tar.xz").stat().st_size <= 0.8 * size * packages.MIB
    less = json.loads((tmp_path / "out" / "corpus" / "corpus.json").read_text())
    for name, row in less["domains"].items():
        assert row["tokens"]["validation"] == whole["domains"][name]["tokens"]["validation"]
        assert row["tokens"]["train"] < whole["domains"][name]["tokens"]["train"]
    before = _times(tmp_path / "out")
    packages.main(_options(tmp_path, max_mib=0.8 * size))
    assert _times(tmp_path / "out") == before


@needs_dpkg
def test_a_domain_with_too_little_text_is_named(fake: FakeApt, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="domain digits needs 65,536 tokens for validation"):
        packages.main(_options(tmp_path, min_tokens=1.0))


@needs_dpkg
def test_sigterm_leaves_no_half_file(fake: FakeApt, tmp_path: Path) -> None:
    (fake.state / "slow").touch()
    code = (
        "from demo import packages, recipe; from pathlib import Path; import test_packages as t; "
        "packages.DOMAINS = t.MADE_UP; "
        f"recipe.run_step(lambda: packages.main(t._options(Path({str(tmp_path)!r}))))"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "demo")))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    end = time.monotonic() + 60
    while not (fake.state / "begun").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "out" / "debs").iterdir()) == []


def test_a_machine_without_apt_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="lacks apt-cache, apt-get, dpkg-deb"):
        packages.main(Options(output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("flag", "value"), [("min_domains", 15), ("megabytes", 0.01), ("vocab_size", 70_000), ("max_mib", 0.0)]
)
def test_bad_options_are_named(tmp_path: Path, flag: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} must be"):
        Options(output=tmp_path / "out", **{flag: value}).check()  # type: ignore[arg-type]


def test_the_highest_version_that_apt_can_download_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _use(make_apt(tmp_path), monkeypatch)
    digest = hashlib.sha256(b"").hexdigest()
    record = "Package: {}\nVersion: 1\nSize: 0\nSHA256: " + digest + "\n{}\n\n"
    for name in ("golang-1.9-src", "golang-1.19-src", "other"):
        made.list(name, record.format(name, "Filename: a.deb"))
    # installed by hand: apt has no file of it
    made.list("golang-1.30-src", record.format("golang-1.30-src", "Status: installed"))
    made.list("golang-1.40-src", "")
    found = apt.find_packages([r"golang-\d[\d.]*-src", "missing"])
    assert {pattern: package.name for pattern, package in found.items()} == {r"golang-\d[\d.]*-src": "golang-1.19-src"}


def test_html_becomes_text() -> None:
    page = """<html><head><title>no</title></head><body><!-- no --><nav>no <b>no</b></nav>
<h1>A &amp; B</h1><p>One   <code>List&lt;E&gt;</code>
line</p><script>no()</script><p></p><ul><li>x</li><li>1 < 2</li></ul><footer>no</footer></body></html>"""
    assert [line for line in text_of_html(page).split("\n") if line] == ["A & B", "One List<E>", "line", "x", "1 < 2"]


def test_repeated_long_lines_are_left_out() -> None:
    counts: Counter[str] = Counter()
    menu = "Contents | Index | Search | Help"
    pages = [strip_menus(f"{menu}\npage {n}\n}}", counts=counts) for n in range(package_texts.MENU_PAGES + 2)]
    assert pages[0] == f"{menu}\npage 0\n}}"
    assert [menu in page for page in pages] == [True] * package_texts.MENU_PAGES + [False] * 2
    assert pages[-1] == f"page {package_texts.MENU_PAGES + 1}\n}}"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Die Datei wird mit der Taste auf dem Bildschirm gelöscht und bleibt nicht mehr da."),
        ("fr", "Le fichier est dans la liste des documents et une page est ouverte pour le lecteur."),
        ("en", "The file is in the list of documents and this page is to be read with care."),
        ("ru", "Файл удалён из списка, страница открыта."),
        ("ja", "このファイルは一覧から削除されました。"),
    ],
)
def test_languages_are_told_apart(language: str, text: str) -> None:
    known = ("de", "fr", "en") if language in ("de", "fr", "en") else ("de", "fr", "en", language)
    assert [name for name in known if is_in_language(text, name)] == [language]


def test_long_texts_become_consecutive_documents() -> None:
    text = "\n".join(f"line {n}" for n in range(1000))
    parts = split_long(text, max_chars=500)
    assert "".join(parts) == text
    assert all(len(part) <= 500 for part in parts)
    assert all(part.startswith("\nline") for part in parts[1:])
    assert split_long("short", max_chars=500) == ["short"]


def test_a_very_long_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_texts, "FILE_CHARS", 100)
    lines = [f"line {n:03} {'x' * 90}" for n in range(200)]
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.txt").write_text("\n".join(lines))
    texts = list(MADE_UP[0].texts(tmp_path, rng=random.Random(0)))
    assert len(set(texts)) == package_texts.MAX_TEXTS
    assert {text.strip() for text in texts} <= set(lines)


def test_all_documents_of_a_text_are_in_one_split() -> None:
    texts = ["\n".join(f"text {t} line {n} {'x' * 50}" for n in range(40 if t % 2 else 2)) for t in range(90)]
    config = CorpusConfig(max_document_chars=500, max_text_chars=10_000, min_document_chars=80)
    splits = split_documents(texts, config=config)
    found = {name: [int(part.split()[1]) for part in splits[name]] for name in splits}
    assert set().union(*found.values()) == set(range(90))
    assert sum(len(set(numbers)) for numbers in found.values()) == 90
    for name, numbers in found.items():
        assert all(80 <= len(part) <= 500 for part in splits[name])
        # the parts of a text do not follow each other
        neighbours = sum(a == b for a, b in itertools.pairwise(numbers))
        assert neighbours < len(numbers) / 4


def test_the_domains_are_fourteen_and_find_their_files(tmp_path: Path) -> None:
    domains = {domain.name: domain for domain in DOMAINS}
    assert len(domains) == len(DOMAINS) == 14
    page = "<html><p>" + "Die Datei wird auf der Seite nicht gelöscht und bleibt da. " * 20
    code = "/* Copyright 2020 Me */\n" + "int f(void);\n" * 60
    files = {
        "rust-src/usr/src/rust/library/a.rs": code,
        "rust-src/usr/src/rust/tests/b.rs": code,
        "libreoffice-help-de/usr/share/a.html": page,
        "libreoffice-help-de/usr/share/b-big-page.html": page,
        "libreoffice-help-de/usr/share/c.html": "<p>" + "The file is not in the list of the page. " * 20,
        "set/usr/share/a.mm": "$( proof $)\n" * 60,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def read(name: str) -> list[str]:
        return list(domains[name].texts(tmp_path, rng=random.Random(0)))

    assert read("rust") == [code.partition("\n")[2]]
    assert read("german") == [text_of_html(page)]
    assert read("french") == []
    assert read("proofs") == [files["set/usr/share/a.mm"]]
