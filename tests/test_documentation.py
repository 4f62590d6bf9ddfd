"""The documentation does what it says: code runs, commands are read by the program's own parsers, and those that take
seconds run; messages, keys and links are those of the program. Two pages are guides, which test_guides.py pastes.
"""

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m4kernels
from m4.config import load_config
from m4.generation.files import endings
from tests.documentation import (
    DOCS,
    GUIDES,
    OTHERS,
    PAGES,
    SETTING,
    WITH_FILES,
    arguments_of,
    blocks,
    check_make,
    check_pip,
    check_pytest,
    check_settings,
    entry_point,
    fenced_commands,
    inline_commands,
    known_options,
    module_of,
    small_recipes,
)
from tests.runs import RECIPE, REPOSITORY

# What fragments of code stand on.
BEFORE = {
    "README.md": """
import torch
import m4kernels as mk

xy, visible = torch.rand(4, 13, 2) * 256, torch.ones(4, 13, dtype=torch.bool)
scale, offset = torch.ones(2), torch.zeros(2)
ids, allow = torch.arange(4), torch.tensor([[True, True], [False, True]])
q_segments = k_segments = mk.Segments.from_counts(torch.tensor([[5, 0], [2, 1]]))
q, k, v = torch.randn(3, 8, 4, 32).unbind(0)
x, h, weight = torch.randn(8, 16), torch.randn(8, 16), torch.randn(16, 16)
targets, gain = torch.arange(8), torch.ones(16)
spec = mk.MaskingSpec((39,), (1.0,), (1.0,), (8, 16), (8, 16))
params, grads, exp_avgs, exp_avg_sqs = ([torch.rand(3)] for _ in range(4))
steps, factor = [torch.tensor(0.0)], torch.tensor(1.0)
""",
}
PYTHON = [
    pytest.param(page, block, id=block.place)
    for page in PAGES
    if page.name not in GUIDES | WITH_FILES
    for block in blocks(page)
    if block.language == "python"
]
FENCED = [
    pytest.param(words, id=f"{place} {' '.join(words)[:70]}")
    for page in PAGES
    if page.name not in GUIDES
    for place, words in fenced_commands(page)
]
INLINE = [
    pytest.param(words, id=f"{page.name} {' '.join(words)[:70]}")
    for page in PAGES
    if page.name not in GUIDES
    for words in {tuple(words): words for words in inline_commands(page)}.values()
]
# Pages whose commands are run, one after the other in one folder: what a page makes the next one reads.
RUN = ["penn-action.md", "quick-start.md", "evaluating.md", "generating.md"]
# What makes a command take seconds, and what this process cannot do.
SMALLER = {"--videos": "3", "--workers": "1", "--rollout": "2", "--samples": "2"}
LESS = {"m4.evaluate": ["--max-samples", "2"], "m4.generate": ["--steps", "2"]}
NOT_RUN = {"pip", "make", "torchrun", "huggingface-cli", "python3", ".", ".venv/bin/python"}
NEEDS_WEIGHTS = {"cosmos", "blip"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to type commands in, with the recipes as they are."""
    for recipe in REPOSITORY.glob("M4-*.yaml"):
        shutil.copy(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_folders(words):
    """What a command asks for by name before it starts."""
    for option, value in itertools.pairwise(words):
        if option in ("--run", "--data", "--cosmos-dir"):
            (Path(value) / "checkpoints").mkdir(parents=True, exist_ok=True)
        if option == "--image":
            Path(value).touch()


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_code_runs(page, block, one_thread):
    torch.manual_seed(0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = compile(BEFORE.get(page.name, "") + block.text, block.place, "exec")
        exec(code, {"__name__": "documentation"})
    after = page.read_text().partition(block.text)[2]
    shown = re.search(r"^```(\w+)\n(.*?)^```$", after, re.MULTILINE | re.DOTALL)
    if shown and shown[1] == "text":  # what it prints, but for the last digits of other machines
        assert re.sub(r"[\d.]+", "#", said.getvalue()) == re.sub(r"[\d.]+", "#", shown[2])
        ours, theirs = ([float(n) for n in re.findall(r"[\d.]+", text)] for text in (said.getvalue(), shown[2]))
        assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("words", FENCED)
def test_commands_are_the_programs(words, place, monkeypatch):
    if words[0] in OTHERS or words[0].startswith("status") or words[:3] == ["python3", "-m", "venv"]:
        return
    if words[0] in ("make", "pip", "pytest"):
        return {"make": check_make, "pip": check_pip, "pytest": check_pytest}[words[0]](words)
    found = module_of(words)
    assert found is not None, f"a program that nobody knows: {words[0]}"
    module, arguments = found
    make_folders(arguments)
    asked = arguments_of(monkeypatch, module, arguments)
    if module == "m4.train":
        check_settings(asked.config, asked.overrides)
    if module == "m4.generate":
        assert [path for path in asked.out if path.suffix not in endings()] == []


@pytest.mark.parametrize("words", INLINE)
def test_commands_in_sentences_are_the_programs(words, place, monkeypatch):
    """They may be cut short; but module, sub-command, options and keys exist."""
    if words[0] in ("make", "pytest"):
        return {"make": check_make, "pytest": check_pytest}[words[0]](words)
    if any(word in ("NAME", "COMMAND", "m4.X", "X", "m4.NAME") for word in words[:3]):
        return
    if words[1] == "--help":
        return
    module, arguments = module_of(words)
    parser = arguments_of(monkeypatch, module, [], before=True)
    options = {word.partition("=")[0].rstrip(",.") for word in arguments if word.startswith("--")}
    assert options <= (known_options(parser, arguments) if parser else set())
    if module == "m4.data" and arguments:
        assert arguments[0] in known_commands(parser)
    if module == "m4.train":
        settings = [word for word in arguments if SETTING.fullmatch(word) and not word.startswith("key=")]
        check_settings(RECIPE, settings)


def known_commands(parser):
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


def test_mistakes_in_commands_are_seen(place, monkeypatch):
    for words, said in (
        ("m4 train --config M4-tiny.yaml --dry-rum", "--dry-rum"),
        ("python -m m4.data prepare --penn-action P --out o --framing middle", "status 2"),
        ("python -m m4.plots --run runs/x --what nothing", "--what"),
        ("torchrun --nproc-per-node 2 -m m4.train --confg M4-tiny.yaml", "--config"),
    ):
        module, arguments = module_of(words.split())
        make_folders(arguments)
        with pytest.raises(ValueError, match=said):
            arguments_of(monkeypatch, module, arguments)
    with pytest.raises(ValueError, match=r"modle\.dim: unknown key"):
        check_settings(RECIPE, ["modle.dim=8"])
    for check, words in (
        (check_make, "make demos"),
        (check_make, "make torture KILL=1"),
        (check_pip, "pip install .[x]"),
    ):
        with pytest.raises(AssertionError):
            check(words.split())


@pytest.mark.timeout(900)  # half a minute on an idle core
def test_pages_can_be_typed(tmp_path, monkeypatch, one_thread, capsys):
    """Every command of some pages, in order, with smaller numbers: all end with status 0."""
    small_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = []
    for page in RUN:
        for _, words in fenced_commands(DOCS / page):
            if words[0] in NOT_RUN or set(words) & NEEDS_WEIGHTS:
                continue
            prepare_for(words, tmp_path)
            module, arguments = module_of(words)
            arguments = [SMALLER.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
            monkeypatch.setattr("sys.argv", [module, *arguments, *LESS.get(module, [])])
            assert entry_point(module)() == 0, (words, capsys.readouterr().err)
            done.append(module)
    assert set(done) == {"m4.data", "m4.train", "m4.evaluate", "m4.plots", "m4.generate"}
    assert len(done) >= 20
    for written in ("next.png", "motion.gif", "motion.json", "poses.npz", "tokens/contact_sheet.png"):
        assert (tmp_path / written).stat().st_size > 0


def prepare_for(words, folder):
    """The files of one's own that a command names."""
    if "--image" in words:
        frame = next((folder / "Penn_Action/frames").rglob("*.jpg"))
        shutil.copy(frame, folder / words[words.index("--image") + 1])


def test_values_of_the_recipe_are_those_of_the_recipe():
    config, _ = load_config(RECIPE)
    lines = [line for block in blocks(DOCS / "m4.md") if block.language == "yaml" for line in block.text.splitlines()]
    settings = ["=".join(map(str.strip, line.split(":", 1))) for line in lines]
    assert len(settings) >= 15
    assert load_config(RECIPE, settings)[0] == config
    assert load_config(RECIPE, [*settings, "lr=0.001"])[0] != config


def test_blocks_of_json_are_json():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "json":
                json.loads(block.text)


def messages():
    """All text of the program, as what it says is pieced together: \\0 where something else is put in."""
    for path in [
        REPOSITORY / "setup.py",
        *(p for room in ("m4", "m4kernels") for p in (REPOSITORY / room).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield (REPOSITORY / ".ci/setup").read_text()


def test_messages_are_the_programs():
    known = "\n".join(messages())
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    parts = [part.strip() for row in rows for said in re.findall(r"`([^`]*)`", row) for part in said.split("…")]
    assert len(rows) >= 40
    assert [part for part in parts if part not in known] == []
    assert "no such message, anywhere" not in known


def slug(heading):
    """The anchor that code hosts give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def headings(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")}


def texts():
    """(file, text) of all that may hold links."""
    for page in [*PAGES, REPOSITORY / "benchmarks/NOTES.md", REPOSITORY / "CHANGELOG.md"]:
        yield page, re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for path in (REPOSITORY / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield path, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_links_lead_to_headings():
    wrong, seen = [], 0
    for page, text in texts():
        for link, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(?:#([^)\s]+))?\)", text):
            target = (page.parent / link).resolve() if link else page
            seen += 1
            if not target.exists() or (anchor and anchor not in headings(target)):
                wrong.append(f"{page.name}: {link}#{anchor}")
    assert wrong == []
    assert seen > 100


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []
    assert "(docs/README.md)" in (REPOSITORY / "README.md").read_text()


def test_the_reference_is_made_of_docstrings(tmp_path):
    """`make docs`, of the kernels alone."""
    pytest.importorskip("pdoc", reason="needs pdoc: pip install -e '.[dev]'")
    recipe = re.search(r"^docs:.*\n\t\$\(PY\) -m (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1]
    words = shlex.split(recipe)
    words[words.index("build/api")] = str(tmp_path)
    assert words.pop() == "m4"
    done = subprocess.run([sys.executable, "-m", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "m4kernels.html").read_text()
    for name in set(m4kernels.__all__) - {"__version__"}:
        assert f'id="{name}"' in page
        assert getattr(m4kernels, name).__doc__
