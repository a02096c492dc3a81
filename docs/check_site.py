"""Checks that internal links of the built site resolve, and that no page fetches anything.

    python docs/check_site.py build/docs/html

Prints every finding as `page: message` and exits with status 1 if there is any. "Fetches" means
what a browser loads without a click: scripts, styles, fonts, pictures and frames, but no links.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"src", "srcset", "poster", "data"}
IN_CSS = re.compile(r"(?:url\(|@import\s+)['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)


class Page(HTMLParser):
    """The anchors and links of a page, and the resources that a browser fetches for it."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = IN_CSS.findall(text)
        self.titles = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.titles += tag == "h1"
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        self.fetched += [attributes[name] for name in FETCHED & attributes.keys()]
        if "href" in attributes:
            (self.links if tag == "a" else self.fetched).append(attributes["href"])


def is_outside(link: str) -> bool:
    """Returns whether a link leaves the site."""
    parts = urlsplit(link)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "mailto")


def findings(site: Path) -> Iterator[str]:
    """Yields every finding in the files of a folder as `page: message`."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in sorted(pages.items()):
        name = path.relative_to(site)
        for link in page.fetched:
            if is_outside(link):
                yield f"{name}: fetches {link}"
        if page.titles != 1 and path.name != "search.html":  # its title needs a script
            yield f"{name}: has {page.titles} titles"
        for link in filter(lambda link: not is_outside(link), page.links + page.fetched):
            parts = urlsplit(link)
            if parts.scheme:  # for example "data:"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name}: leads to {link}, which does not exist"
            elif target in pages and unquote(parts.fragment) not in {"", *pages[target].anchors}:
                yield f"{name}: leads to {link}, which has no such anchor"
    for path in sorted(site.rglob("*.css")):
        for link in IN_CSS.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: fetches {link}"
    if not pages:
        yield f"{site}: has no pages"


if __name__ == "__main__":
    found = list(findings(Path(sys.argv[1])))
    print("\n".join([*found, f"{len(found)} findings in {sys.argv[1]}"]))
    sys.exit(bool(found))
