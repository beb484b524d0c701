"""The domains of the corpus for a GPU: which Debian packages have their text, and how the text is read.

Every domain lists patterns of package names, because names contain versions that differ between releases of Debian and
Ubuntu. A pattern without a package is left out.
"""

import html
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.sources import (
    HASH_COMMENT,
    SLASH_COMMENT,
    find_files,
    group_catalog,
    read_texts,
    split_long,
    strip_licences,
    unroff,
)

MAX_FILE_BYTES = 64_000_000
FILE_CHARS = 240_000
"""Characters of a text. A longer file yields several texts, which can be in different splits of the corpus. A text has
less than `sources.MAX_FILE_BYTES` bytes."""
MAX_TEXTS = 40
"""Texts taken from one file; of a longer file, a random sample."""
MENU_PAGES = 5
"""Pages of a domain that may repeat a line; further pages lose the line."""
MENU_CHARS = 20
"""Shorter lines may be repeated in any number of pages."""
PERCENT_COMMENT = re.compile(r"(?:^[ \t]*%.*(?:\n|\Z))+", re.M)

_HIDDEN = re.compile(r"<!--.*?-->|<(script|style|head|nav|header|footer|svg|noscript)\b.*?</\1\s*>", re.S | re.I)
_BREAK = re.compile(
    r"</?(?:p|div|h\d|li|ul|ol|dl|dt|dd|tr|table|br|hr|pre|section|article|blockquote|figure|main)\b[^>]*>", re.I
)
_TAG = re.compile(r"</?[A-Za-z!?][^>]*>")
_COMMON_WORDS = {
    "de": frozenset({"der", "die", "und", "das", "sind", "nicht", "mit", "ein", "eine", "wird", "von", "zu", "auf"}),
    "fr": frozenset({"le", "la", "les", "de", "des", "et", "est", "une", "un", "pour", "dans", "que", "du", "par"}),
    "en": frozenset({"the", "of", "and", "to", "is", "in", "for", "that", "this", "be", "as", "are", "with", "by"}),
}
# the first letter after Latin, in Greek; Cyrillic and Japanese come later
_AFTER_LATIN = "\u0370"


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A domain and the packages that its text comes from."""

    name: str
    patterns: tuple[str, ...]
    """Regular expressions for whole names of packages; of several matches, the highest version in the name is taken."""
    files: str
    """Regular expression, searched in the path of a file: PACKAGE/usr/..."""
    skip: str = "(?!)"
    """Regular expression for paths of files that are left out."""
    comment: re.Pattern[str] | None = None
    """Comments of the programming language; comments with a licence are removed."""
    language: str | None = None
    """Language of the documents; documents that seem to be in English are left out."""

    def texts(self, root: Path, *, rng: random.Random) -> Iterator[str]:
        """Yield the texts below a folder with one subfolder per package, possibly with duplicates.

        Files of all packages take turns. A text is one file, or FILE_CHARS of a very long file.
        """
        counts: Counter[str] = Counter()
        for path in find_files([root], ("",), rng=rng, skip=frozenset()):
            name = path.relative_to(root).as_posix()
            if re.search(self.files, name) and not re.search(self.skip, name):
                for text in self._read(path, counts=counts):
                    if self.language is None or is_in_language(text, self.language):
                        found = split_long(text, max_chars=FILE_CHARS)
                        yield from found if len(found) <= MAX_TEXTS else rng.sample(found, MAX_TEXTS)

    def _read(self, path: Path, *, counts: Counter[str]) -> Iterable[str]:
        if path.suffix == ".mo":
            return ["\n".join(group_catalog(path))]
        texts = read_texts([path], max_bytes=MAX_FILE_BYTES)
        if self.comment is not None:
            return (strip_licences(text, comment=self.comment) for text in texts)
        if path.suffix == ".gz":
            texts = map(unroff, texts)
        elif path.suffix == ".html":
            texts = map(text_of_html, texts)
        else:
            return texts
        return (strip_menus(text, counts=counts) for text in texts)


def text_of_html(source: str) -> str:
    """The text of an HTML page, without navigation, headers and footers; blocks become lines."""
    text = _TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub("", source)))
    lines = (" ".join(line.split()) for line in html.unescape(text).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def strip_menus(page: str, *, counts: Counter[str]) -> str:
    """Remove the long lines of a page that were already in several pages: menus, banners, licences.

    Args:
        page: the text.
        counts: line -> number of pages so far; updated.
    """
    lines = page.split("\n")
    kept = [line for line in lines if len(line) < MENU_CHARS or counts[line] < MENU_PAGES]
    counts.update({line for line in lines if len(line) >= MENU_CHARS})
    return "\n".join(kept)


def is_in_language(text: str, language: str) -> bool:
    """Whether a text seems to be in this language (de, fr, en, or one without Latin letters) and not in English."""
    if language not in _COMMON_WORDS:
        return sum(letter >= _AFTER_LATIN for letter in text) > len(text) / 5
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in common for word in words) for name, common in _COMMON_WORDS.items()}
    others = max(count for name, count in counts.items() if name != language)
    return counts[language] > 2 * others


def _translated(language: str, *more: str) -> Domain:
    """Help pages, manual pages and messages in a language."""
    packages = (
        *(f"libreoffice-help-{language}", f"manpages-{language}", f"manpages-{language}-dev"),
        *(f"lilypond-doc-html-{language}", f"libreoffice-l10n-{language}"),
        *(f"debian-reference-{language}", f"developers-reference-{language}", f"aptitude-doc-{language}"),
        *(r"gcc-\d+-locales", "util-linux-locales", f"language-pack-(gnome-)?{language}-base"),
    )
    names = {"de": "german", "fr": "french", "ru": "russian", "ja": "japanese"}
    return Domain(
        name=names[language],
        patterns=(*packages, *more),
        files=rf"\.html$|/man/{language}/.*\.gz$|/{language}/.*\.mo$|/fortunes/{language}/[^.]+$",
        # the whole manual in one page, and lists of names
        skip=r"-big-page|/iso_[^/]*$",
        language=language,
    )


DOMAINS = (
    Domain(name="rust", patterns=("rust-src",), files=r"\.rs$", skip="/(tests|ui)/", comment=SLASH_COMMENT),
    Domain(name="go", patterns=(r"golang-\d[\d.]*-src",), files=r"\.go$", skip="/testdata/", comment=SLASH_COMMENT),
    Domain(
        name="cpp",
        patterns=(r"libboost\d[\d.]*-dev",),
        files=r"\.[hi]pp$",
        # generated by Boost's preprocessor
        skip="/(preprocessed|preprocessor|aux_)/",
        comment=SLASH_COMMENT,
    ),
    Domain(
        name="c", patterns=(r"linux-headers-\d[\d.]*(-\d+|\+deb\d+)(-common)?",), files=r"\.h$", comment=SLASH_COMMENT
    ),
    Domain(
        name="java_api",
        patterns=(r"openjdk-\d+-doc",),
        files=r"/api/.*\.html$",
        skip="/(class-use|index-files|legal)/|(package-(tree|use)|help-doc|overview-tree|(allclasses|allpackages)-index)",
    ),
    Domain(name="erlang", patterns=("erlang-src",), files=r"\.[eh]rl$", comment=PERCENT_COMMENT),
    Domain(
        name="php",
        patterns=("wordpress", "phpmyadmin", "roundcube-core", "icingaweb2", "php-horde-imp", "dokuwiki", "tt-rss"),
        files=r"\.php$",
        comment=SLASH_COMMENT,
    ),
    Domain(
        name="python",
        patterns=("python3-sympy", "python3-django", r"libpython3\.\d+-stdlib", "python3-twisted", "python3-networkx"),
        files=r"\.py$",
        skip="/(tests?|testing)/",
        comment=HASH_COMMENT,
    ),
    _translated("de"),
    _translated("fr"),
    _translated("ru", "debian-faq-ru", "maint-guide-ru", "fortunes-ru", "gnucash-common", "krita-l10n"),
    _translated("ja", "maint-guide-ja"),
    Domain(
        name="english",
        patterns=(
            *("libreoffice-help-en-us", "manpages", "manpages-dev", r"postgresql-doc-\d+", r"python3\.\d+-doc"),
            *("git-doc", "bash-doc", "debian-policy"),
        ),
        files=r"\.html$|/man\d/.*\.gz$",
        skip=r"-big-page|/man\d/.*\.\d?(pl|pm)",
        language="en",
    ),
    Domain(name="proofs", patterns=("metamath-databases", "hol-light"), files=r"\.(mm|ml|hl)$"),
)
"""Programming languages, interfaces, translations, manuals and formal proofs."""
