"""What the documentation holds: pages, their blocks, the commands in them, and what the program makes of a command."""

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from m4.__main__ import COMMANDS
from m4.config import load_config
from m4.data.__main__ import main as data_main
from tests.runs import REPOSITORY

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# Their blocks are the files of an example, which tests/test_guides.py pastes and runs.
GUIDES = {"add-an-op.md", "add-a-backend.md"}
# Whose code builds on files of others; tests/compat/test_page.py runs it.
WITH_FILES = {"moving-from-nano4m.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SETTING = re.compile(r"([a-z_.]+)=(.*)", re.DOTALL)
MODULE = re.compile(r"(m4|m4kernels|benchmarks|tests)(\.\w+)*")
# Programs of others that the pages name; what comes after them is theirs.
OTHERS = {"huggingface-cli", "tensorboard", "srun", "scontrol", "cd", "mkdir", "touch", "git", "head", "status", "exit"}
OTHERS |= {"if", ".", "pre-commit"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" for none), its text and where it is."""

    language: str
    text: str
    place: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1], found[2], f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}")
        for found in FENCE.finditer(text)
    ]


def shell_lines(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, without comments."""
    joined = block.text.replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in joined.splitlines() if not line.startswith("#"))
    return [words for words in lines if words]


def fenced_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every command in the blocks of a page; a block without a language may hold other things."""
    for block in blocks(page):
        if block.language == "bash":
            yield from ((block.place, words) for words in shell_lines(block))
        elif not block.language:
            joined = block.text.replace("\\\n", " ").splitlines()
            for line in joined:
                if re.match(r"(python3?|m4|make|torchrun|pytest|pip|\S*/python) ", line):
                    yield block.place, shlex.split(line, comments=True)


def inline_commands(page: Path) -> list[list[str]]:
    """The words of commands within sentences; they may be cut short or hold words for what one puts there."""
    text = FENCE.sub("", page.read_text())
    found = [span for span in INLINE.findall(text) if re.match(r"(python -m (m4|bench|tests)|m4 |make |pytest )", span)]
    return [span.split() for span in found]


class Stopped(Exception):
    """A command is stopped where it would read its arguments, or has read them."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command of ours: ``python -m m4.X …``, ``m4 X …``, ``torchrun … -m m4.X …``."""
    name = words[0].rpartition("/")[2]
    if name in ("python", "python3") and words[1:2] == ["-m"] and MODULE.fullmatch(words[2]):
        return words[2], words[3:]
    if name == "m4" and words[1] in COMMANDS:
        return COMMANDS[words[1]][0].removesuffix(".__main__"), words[2:]
    if name == "torchrun":
        asked = get_args_parser().parse_args(words[1:])
        assert asked.module, words
        return asked.training_script, asked.training_script_args
    return None


def entry_point(module: str) -> Callable[[], Any]:
    """The function that ``python -m module`` runs."""
    if module == "m4.data":
        return lambda: data_main(sys.argv[1:])
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if is_package else module).main


def stop_at_arguments(monkeypatch: Any, *, before: bool) -> None:
    """From now on commands raise `Stopped`: with their parser, before they read arguments, or with what they read."""
    real = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if before:
            raise Stopped(parser)
        method = argparse.ArgumentParser.parse_known_intermixed_args if _intermixed(parser) else None
        if method is None:
            raise Stopped(real(parser, args, namespace))
        found, left = method(parser, args, namespace)
        if left:
            parser.error(f"unrecognized arguments: {' '.join(left)}")
        raise Stopped(found)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)


def _intermixed(parser: argparse.ArgumentParser) -> bool:
    return any(not action.option_strings and action.nargs == "*" for action in parser._actions)


def arguments_of(monkeypatch: Any, module: str, arguments: list[str], *, before: bool = False) -> Any:
    """What a command reads of these arguments, or its parser; raises what the parser says of a mistake."""
    with monkeypatch.context() as patch:
        stop_at_arguments(patch, before=before)
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            status = entry_point(module)()
        except Stopped as stopped:
            return stopped.found
    if status:  # m4.data has said why
        raise ValueError(f"{module}: status {status}")
    return None  # a command without arguments


def known_options(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """The options of a parser, and of the sub-command that the words name."""
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words and words[0] in action.choices:
            options |= set(action.choices[words[0]]._option_string_actions)
    return options


def check_settings(config: Path, overrides: list[str]) -> None:
    """Raise ConfigError for a key or a value that the trainer refuses."""
    load_config(config, overrides)


def check_make(words: list[str]) -> None:
    """Targets and variables of a ``make`` command are those of the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in words[1:]:
        name, found, _ = word.partition("=")
        known = (
            rf"\$\(call given,{name}\)|\$\({name}\)|\$\(or \$\({name}\)" if found else rf"^[\w\- ]*\b{name}\b[\w\- ]*:"
        )
        assert re.search(known, makefile, re.MULTILINE), f"make: no {word}"


def check_pip(words: list[str]) -> None:
    """Extras of this package that are to be installed exist."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[2:]:
        found = re.fullmatch(r"(?:\.|m4kernels)\[(\w+)\]", word)
        assert found is None or found[1] in extras, word


def check_pytest(words: list[str]) -> None:
    for word in words[1:]:
        path = word.partition("::")[0]
        assert "/" not in path or word.startswith("-") or (REPOSITORY / path).exists(), word


def small_recipes(folder: Path) -> None:
    """The recipes of the repository in a folder, cut to two steps of a tiny model on a handful of videos."""
    small = {"batch_size": 4, "global_batch_size": 4, "num_tokens_per_sample": 1000, "total_tokens": 0.008}
    small |= {"token_warmup": 0.004, "eval_freq": 0.004, "save_ckpt_freq": 0.004, "eval_samples": 2}
    small |= {"eval_generate_samples": 1, "vocab_sizes": [64000, 8192, 64000, 8192]}
    model = {"dim": 16, "head_dim": 8, "enc_depth": 1, "dec_depth": 1}
    for recipe in REPOSITORY.glob("M4-*.yaml"):
        values = yaml.safe_load(recipe.read_text()) | small
        values["model"] = values["model"] | model
        values["data"] = values["data"] | {"sample_dir": "data/sample", "sample_videos": 3}
        values["log"] = values["log"] | {"tensorboard": False}
        (folder / recipe.name).write_text(yaml.safe_dump(values))
