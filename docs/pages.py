"""What `make docs` adds to MkDocs: pages of the API, and pages that mkdocs.yml does not name.

A hook of MkDocs, and an extension of griffe, which reads the docstrings without importing.
"""

import functools
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

log = get_plugin_logger("api")
OPTIONS = "    options:\n      heading_level: 1\n      show_root_full_path: true\n"


class Sessions(griffe.Extension):
    """Fences the sessions in docstrings: in Markdown, `>` begins a quotation."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            # With what it printed, up to an empty line.
            sessions = re.compile(r"^>>> .*\n?(?:.+\n?)*", re.M)
            value = sessions.sub(lambda s: f"```pycon\n{s[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "**Example**", value, flags=re.M)


@functools.cache
def api() -> dict[str, str]:
    """Returns the API's pages: one for the package, one for each public module."""
    package = griffe.load("keras_dfp", search_paths=["."])
    entries, modules = [], {}
    for name in map(str, package.exports):
        found = package[name]
        # Once the package is imported, a function that has the name of its module hides it.
        if found.is_module and name in found.members:
            found = found[name]
        if name == "__version__":
            continue
        if found.is_module:
            modules[found.path] = f"::: {found.path}\n{OPTIONS}"
            check(found, *(m for m in found.members.values() if m.is_public and not m.is_alias))
        else:
            entries.append(f"::: {found.canonical_path}\n")
            check(found)
    top = f"# keras_dfp\n\n{package.docstring.value.partition(chr(10))[0]}\n\n" + "\n".join(entries)
    return {"keras_dfp": top, **dict(sorted(modules.items()))}


def check(*objects: griffe.Object) -> None:
    for found in objects:
        if (found.is_function or found.is_class or found.is_module) and not found.has_docstring:
            log.warning("%s is public and has no docstring", found.path)


def on_config(config: MkDocsConfig) -> None:
    sections = {name: pages for entry in config.nav for name, pages in entry.items()}
    for page in sorted(Path("docs").glob("*.md")):
        if str(page) not in str(config.nav):
            sections["Use it"].append(str(page))
    sections["API"] += [{name: f"api/{name}.md"} for name in api()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    for name, content in api().items():
        files.append(File.generated(config, f"api/{name}.md", content=content))
