"""An mkdocs hook: links to files outside docs/ work as in the repository, and commands wrap between words.

Every file that a page links to, such as `../cleanrl/teachers/README.md`, gets a page on the site; source code
is shown as a listing. A link to a folder becomes plain text, because the site has no folders. A dead link is
left as it is, and `mkdocs build --strict` fails on it.
"""

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = PurePosixPath("docs")
OUTSIDE = PurePosixPath("files")  # the site's folder for files outside docs/
LINK = re.compile(r"(?<!!)\[(?P<text>[^]]*)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
COMMANDS = re.compile(r'<div class="language-bash highlight">.*?</pre>', re.DOTALL)
HYPHENATED = re.compile(r"[^\s<>]*-[^\s<>]*(?=[^<>]*<)")  # outside tags
LISTING = """\
---
search: {{exclude: true}}
hide: [toc]
---
# `{path.name}`

````` {{ .{language} title="{path}" linenums="1" }}
{content}
`````
"""


def target_of(link: re.Match, page: PurePosixPath) -> PurePosixPath:
    """The target of a link on a page; both are paths from the top of the repository."""
    return PurePosixPath(posixpath.normpath(page.parent / link["target"]))


def to_site(path: PurePosixPath) -> PurePosixPath:
    """The path of a repository file's page among the site's sources."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS)
    return OUTSIDE / (path if path.suffix == ".md" else f"{path}.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside docs/ that a page links to."""
    for file in list(files.documentation_pages()):
        page = DOCS / file.src_uri
        for path in {target_of(link, page) for link in LINK.finditer(file.content_string)}:
            source = str(to_site(path))
            if path.is_relative_to(DOCS) or not (ROOT / path).is_file() or source in files.src_uris:
                continue
            content = (ROOT / path).read_text("utf-8")
            if path.suffix != ".md":
                content = LISTING.format(path=path, language=path.suffix[1:], content=content)
            files.append(File.generated(config, source, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points the links of a page to where their targets are on the site."""
    source = PurePosixPath(page.file.src_uri)
    in_repository = source.relative_to(OUTSIDE) if source.is_relative_to(OUTSIDE) else DOCS / source

    def on_the_site(link: re.Match) -> str:
        path = target_of(link, in_repository)
        if (ROOT / path).is_dir():
            return link["text"]
        site_path = posixpath.relpath(to_site(path), source.parent)
        return f"[{link['text']}]({site_path}{link['anchor'] or ''})"

    return LINK.sub(on_the_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Marks words with hyphens in commands: a browser would break lines behind `--`."""

    def mark_words(commands: re.Match) -> str:
        return HYPHENATED.sub(r'<span class="word">\g<0></span>', commands[0])

    return COMMANDS.sub(mark_words, html)
