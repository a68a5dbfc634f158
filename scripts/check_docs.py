"""Check the documentation: links resolve, every name of the code is described, no page is too long.

The names come from the code: settings, commands with their options, metrics, topics and HTTP operations. A name that a
page mentions and the code does not have is a finding too. Prints each finding; exits with 1 if there is any.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from prometheus_client.metrics_core import Metric

from services.api.app import create_app
from services.api.documentation.openapi import openapi_document
from shared.domain.topics import TOPICS
from shared.runtime.metrics import VERIFY, Part, registry_of
from shared.runtime.settings import PREFIX, Settings, load_settings
from tripfold.cli import loaded_commands

ROOT = Path(__file__).resolve().parents[1]
START = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference"
WORDS_MAX = 2_000
HISTORY = "CHANGELOG.md"
"""The only page that may mention former names."""

OTHER_VARIABLES = re.compile(rf"{PREFIX}(API_URL|API_KEY|TEST_\w+|HISTORIES\w*|MUTATION_\w+)")
DECLARE_METRICS = ("services.api.app", "services.ingest.app", "services.aggregate.app")

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_FENCE = re.compile(r"^( *)(```|~~~).*?^ *\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_PATH = re.compile(r"`((?:services|shared|tripfold|client|tests|scripts|bench|docs|examples|deploy)/[\w./-]*)`")
_VARIABLE = re.compile(rf"\b{PREFIX}[A-Z0-9_]+")
_METRIC = re.compile(r"\btripfold_[a-z_]+_(?:total|seconds|bucket|count|sum)\b")
_COMMAND = re.compile(r"(?:^|[`$/ (])tripfold ((?:[a-z][a-z-]*\b ?)+)")


def main() -> None:
    """Check every page."""
    pages = pages_of(ROOT)
    found = [
        *broken_links(pages),
        *unlinked_pages(pages),
        *long_pages(pages),
        *undescribed("settings.md", "setting", settings(), rows=r"^\| `(TRIPFOLD_\w+)`"),
        *undescribed("metrics.md", "metric", metrics(), rows=r"^\| `(tripfold_\w+)` \| (?:counter|gauge|histogram)"),
        *undescribed("metrics.md", "label or its value", label_values()),
        *undescribed("events.md", "topic", {spec.topic.value for spec in TOPICS}),
        *undescribed("http-api.md", "operation", operations()),
        *undescribed_commands(),
        *missing_files(pages),
        *unknown_variables(pages),
        *unknown_metrics(pages),
        *unknown_commands(pages),
    ]
    for finding in dict.fromkeys(found):
        print(finding)
    sys.exit(1 if found else 0)


def pages_of(root: Path) -> dict[Path, str]:
    """Return the text of each Markdown file that git tracks or would track, by its path."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],  # noqa: S607  # the developer's git
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    paths = [root / name for name in listed if name]
    return {path: path.read_text(encoding="utf-8") for path in paths if path.exists()}


def broken_links(pages: dict[Path, str]) -> Iterator[str]:
    """Name each relative link whose file or heading is missing."""
    for page, text in pages.items():
        for target, file, anchor in links_of(page, text):
            if not file.exists():
                yield f"{_name(page)}: the link {target} leads to no file"
            elif anchor and file.suffix == ".md" and anchor not in anchors_of(file.read_text(encoding="utf-8")):
                yield f"{_name(page)}: the link {target} leads to no heading"


def missing_files(pages: dict[Path, str]) -> Iterator[str]:
    """Name each path of the repository that a page mentions as code and that does not exist."""
    for page, text in pages.items():
        for path in sorted(set(_PATH.findall(text))):
            if not (ROOT / path).exists() and page.name != HISTORY:
                yield f"{_name(page)}: there is no file {path}"


def links_of(page: Path, text: str) -> Iterator[tuple[str, Path, str]]:
    """Yield each relative link of a page: as it is written, the file that it names, and the anchor."""
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", text))):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield target, (page.parent / path).resolve() if path else page, anchor


def unlinked_pages(pages: dict[Path, str]) -> Iterator[str]:
    """Name each page that links from the README do not reach."""
    reached: set[Path] = set()
    to_read = {START}
    while to_read:
        reached |= to_read
        to_read = {file for page in to_read for _, file, _ in links_of(page, pages[page]) if file in pages} - reached
    for page in sorted(pages.keys() - reached):
        yield f"{_name(page)}: no link leads here from {_name(START)}"


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        shown = _LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        kept = "".join(letter for letter in shown.lower() if letter in " -_" or unicodedata.category(letter)[0] in "LN")
        anchor = base = kept.replace(" ", "-")
        repeated = 0
        while anchor in anchors:
            repeated += 1
            anchor = f"{base}-{repeated}"
        anchors.add(anchor)
    return anchors


def long_pages(pages: dict[Path, str]) -> Iterator[str]:
    """Name each page of more than WORDS_MAX words."""
    for page, text in pages.items():
        words = len(text.split())
        if words > WORDS_MAX and page.name != HISTORY:
            yield f"{_name(page)}: {words:,} words; split it into pages of at most {WORDS_MAX:,}"


def settings() -> set[str]:
    """Return the environment variables of all settings."""
    return {f"{PREFIX}{field}".upper() for field in Settings.model_fields}


def metrics() -> set[str]:
    """Return the names of Tripfold's metrics, as Prometheus has them."""
    return {f"{metric.name}_total" if metric.type == "counter" else metric.name for metric in _own_metrics()}


def label_values() -> set[str]:
    """Return the labels of the metrics that exist from the start, and their values.

    Topics are in another page, and a version is not described.
    """
    samples = [sample for metric in _own_metrics() for sample in metric.samples]
    labels = [(label, value) for sample in samples for label, value in sample.labels.items()]
    return {name for label, value in labels if label not in {"le", "topic", "version"} for name in (label, value)}


def _own_metrics() -> list[Metric]:
    for module in DECLARE_METRICS:
        importlib.import_module(module)
    exported = [*registry_of(*get_args(Part)).collect(), *VERIFY.collect()]
    return [metric for metric in exported if metric.name.startswith("tripfold_")]


def operations() -> set[str]:
    """Return the operations of the API, such as `GET /country-stats`."""
    schema = openapi_document(create_app(load_settings({f"{PREFIX}API_ACCESS": "open"})))
    return {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}


def undescribed(page_name: str, kind: str, names: set[str], *, rows: str = "") -> Iterator[str]:
    """Name each entry of the code that a reference page lacks; and, with ``rows``, each that only the page has."""
    page = REFERENCE / page_name
    text = page.read_text(encoding="utf-8")
    described = set(re.findall(rows, text, re.MULTILINE)) if rows else {name for name in names if f"`{name}" in text}
    for name in sorted(names - described):
        yield f"{_name(page)}: the {kind} {name} is not described"
    for name in sorted(described - names):
        yield f"{_name(page)}: there is no {kind} {name}"


def commands() -> dict[str, set[str]]:
    """Return the long options of each command, by its full name."""
    return dict(_commands_below("tripfold", loaded_commands()))


def _commands_below(name: str, command: Any) -> Iterator[tuple[str, set[str]]]:
    if command.hidden:
        return
    for below, one in getattr(command, "commands", {}).items():
        yield from _commands_below(f"{name} {below}", one)
    if not hasattr(command, "commands"):
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        yield name, options - {"--help"}


def undescribed_commands() -> Iterator[str]:
    """Name each command that the list of commands lacks, and each option that no page on commands has."""
    listed = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    described = listed + (REFERENCE / "operator-commands.md").read_text(encoding="utf-8")
    for command, options in commands().items():
        if f"`{command}`" not in listed and f"`{command} " not in listed:
            yield f"docs/reference/cli.md: the command {command} is not described"
        for option in sorted(options):
            negated = f"--no-{option[2:]}"
            if not re.search(rf"{option}(?![\w-])|{negated}(?![\w-])", described):
                yield f"docs/reference/cli.md: the option {option} of {command} is not described"


def unknown_variables(pages: dict[Path, str]) -> Iterator[str]:
    """Name each variable that a page mentions and no setting has; a name that ends in _ is a prefix."""
    known = settings()
    for page, text in pages.items():
        for name in sorted(set(_VARIABLE.findall(text))):
            begins = name.endswith("_") and any(one.startswith(name) for one in known)
            if not (name in known or begins or OTHER_VARIABLES.fullmatch(name) or page.name == HISTORY):
                yield f"{_name(page)}: there is no setting {name}"


def unknown_metrics(pages: dict[Path, str]) -> Iterator[str]:
    """Name each counter, time or histogram that a page mentions and no process exports."""
    known = metrics()
    for page, text in pages.items():
        for name in sorted(set(_METRIC.findall(text))):
            if not {name, re.sub("_(bucket|count|sum)$", "", name)} & known and page.name != HISTORY:
                yield f"{_name(page)}: there is no metric {name}"


def unknown_commands(pages: dict[Path, str]) -> Iterator[str]:
    """Name each command that a page mentions as code and the command line does not have."""
    known = set(commands())
    groups = {command.rpartition(" ")[0] for command in known}
    for page, text in pages.items():
        code = "\n".join([match[0] for match in _FENCE.finditer(text)] + _CODE.findall(_FENCE.sub("", text)))
        for words in sorted(set(_COMMAND.findall(code))):
            names = [f"tripfold {' '.join(words.split()[:length])}" for length in (1, 2)]
            if not (known.intersection(names) or names[0] in groups) and page.name != HISTORY:
                yield f"{_name(page)}: there is no command {names[0]}"


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    main()
