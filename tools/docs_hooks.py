"""What mkdocs does for this project's pages, which GitHub shows as well.

* The home page is the README of the repository, and two more of its files are pages.
* A link out of `docs` has to lead to a file of the repository. On the site it becomes a link to
  `repo_url` of mkdocs.yml, or without one the name alone.
* Blocks of `math` become MathML, which browsers show without a script.
* A notebook becomes a page.
* Roles of docstrings, such as :func:, are left out.
* Long names in tables may break behind their dots and underscores, for telephones.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = "tutorial.ipynb"
# Files beside `docs`, and the pages that they become.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
CELL, CODE = re.compile(r"<t[dh]>.*?</t[dh]>", re.DOTALL), re.compile(r"<code>[^<]*")
ROLE = re.compile(r":(?:attr|class|func|meth|mod|paper):(?=<code>)")
# A page whose sources, with their comments, are the text.
OPEN_SOURCES = "config.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")

log = get_plugin_logger("docs_hooks")


def on_config(config):
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(
        {"name": "math", "class": "math", "format": lambda source, *_, **__: _math(source)}
    )
    return config


def _math(source: str) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files, config):
    for file, page in PAGES.items():
        text = LINK.sub(_moved, (REPOSITORY / file).read_text())
        files.append(File.generated(config, page, content=text))
    for file in _notebook_page(config):
        files.append(file)
    return files


def _moved(match) -> str:
    """A link of a file beside `docs` for one inside."""
    image, label, path, anchor = match.groups(default="")
    if path in PAGES:
        path = PAGES[path]
    else:
        path = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
    return f"{image}[{label}]({path}{anchor})"


def _notebook_page(config):
    """The page of the notebook, and the pictures in it."""
    name = NOTEBOOK.removesuffix(".ipynb")
    notebook = json.loads((Path(config.docs_dir) / NOTEBOOK).read_text())
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(parts)}.png"
                content = base64.b64decode(data["image/png"])
                yield File.generated(config, picture, content=content)
                parts.append(f"![What the cell above draws]({picture})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))).rstrip():
                parts.append(f"```text\n{text}\n```")
    yield File.generated(config, f"{name}.md", content="\n\n".join(parts))


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(page.file.src_uri)

    def resolved(match):
        image, label, path, anchor = match.groups(default="")
        target = posixpath.normpath(posixpath.join(folder, path))
        if target == NOTEBOOK and page.file.src_uri != NOTEBOOK.replace(".ipynb", ".md"):
            return f"[{label}]({path.replace('.ipynb', '.md')}{anchor})"
        if not target.startswith("../"):
            return match.group()
        target = os.path.normpath(os.path.join(config.docs_dir, target))
        inside = os.path.relpath(target, REPOSITORY)
        if not os.path.exists(target) or inside.startswith(".."):
            log.warning(f"{page.file.src_uri} links to {path}, which is not in the repository")
        if image or not config.repo_url:
            return label
        return f"[{label}]({config.repo_url.rstrip('/')}/blob/main/{inside}{anchor})"

    return LINK.sub(resolved, markdown)


def on_page_content(html, page, **_):
    def breakable(cell):
        return CODE.sub(
            lambda code: re.sub(r"([._/])(?=\w)", r"\1<wbr>", code.group()), cell.group()
        )

    html = ROLE.sub("", CELL.sub(breakable, html))
    if page.file.src_uri == OPEN_SOURCES:
        html = html.replace(
            '<details class="mkdocstrings-source"', '<details open class="mkdocstrings-source"'
        )
    return html
