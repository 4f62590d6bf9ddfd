"""The build backend: setuptools', but for what an editable install requires.

`pip install m4kernels` brings the kernels alone. `pip install -e .` is for who works in the repository, and brings what
the trainer and the benchmarks need: the extras that `tool.m4.editable` of pyproject.toml names become requirements.
"""

import re
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks of PEP 517
from setuptools.build_meta import build_editable, get_requires_for_build_editable

__all__ = [
    *build_meta.__all__,
    "build_editable",
    "get_requires_for_build_editable",
    "prepare_metadata_for_build_editable",
]

REQUIREMENT = re.compile(r"Requires-Dist: (?P<what>.+?)(?:; (?P<marker>.+))?")
EXTRA = re.compile(r'(?: and )?extra == "(?P<name>.+?)"')


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    name = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    path = Path(metadata_directory, name, "METADATA")
    path.write_text(required(path.read_text(encoding="utf-8"), editable_extras()), encoding="utf-8")
    return name


def editable_extras():
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"(.+?)"', re.search(r"^editable = \[(.*)\]$", text, re.MULTILINE)[1])


def required(metadata, extras):
    """The text of METADATA in which the requirements of these extras hold without asking for them."""
    header, blank, body = metadata.partition("\n\n")
    lines, extras = header.splitlines(), list(extras)
    found = []
    for extra in extras:  # grows by those that an extra is made of
        for line in lines:
            match = REQUIREMENT.fullmatch(line)
            asked = match and EXTRA.search(match["marker"] or "")
            if not asked or asked["name"] != extra:
                continue
            own = re.fullmatch(r"m4kernels\[(.+)\]", match["what"])
            if own:
                extras += [name for name in own[1].split(",") if name not in extras]
                continue
            marker = EXTRA.sub("", match["marker"])
            found.append(f"Requires-Dist: {match['what']}" + (f"; {marker}" if marker else ""))
    return "\n".join([*lines, *found]) + blank + body
