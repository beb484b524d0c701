"""Two changes to MkDocs for the documentation site: GitHub's anchors for headings, and links that leave docs/.

The pages are also read on GitHub, where `../README.md` is a valid link. The site does not contain that file. The link
therefore points into `repo_url` if `repo_url` is configured, and becomes plain text otherwise. MkDocs itself reports a
link to a file that does not exist.
"""

import posixpath
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]


class LinksOut(Treeprocessor):
    """Rewrites links of a page that leave docs/."""

    page = ""
    """Path of the page in docs/."""
    repository: str | None = None
    """URL of the repository."""

    def run(self, root: Element) -> None:
        """Rewrite the links of the page in place."""
        for link in root.iter("a"):
            url = urlsplit(link.get("href", ""))
            path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(self.page), url.path))
            is_ours = not url.scheme and not url.netloc and url.path and not path.startswith("../")
            if not is_ours or path.split("/")[0] == "docs" or not (ROOT / path).exists():
                continue
            if self.repository:
                link.set("href", f"{self.repository.rstrip('/')}/blob/HEAD/{url._replace(path=path).geturl()}")
            else:
                link.tag = "span"
                del link.attrib["href"]
                link.set("title", f"{path} in the repository")


class LinksOutExtension(Extension):
    """Runs LinksOut before MkDocs resolves links, which has priority 0."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the treeprocessor."""
        md.treeprocessors.register(LinksOut(md), "links_out", 1)


def on_config(config: MkDocsConfig) -> None:
    """Configure the anchors and the links."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    config.markdown_extensions.append(LinksOutExtension())  # type: ignore[arg-type]
    LinksOut.repository = config.repo_url


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Set the page of the links; MkDocs renders pages one after another."""
    LinksOut.page = page.file.src_uri
