"""What `make matrix` takes for the oldest versions, and its table."""

from pathlib import Path

from tests.matrix import REPOSITORY, copy_working_tree, floors, requirements_of, table


def test_floors_are_where_the_ranges_begin() -> None:
    requirements = [
        "torch>=2.10",
        "safetensors>=0.4.5",
        "ninja",
        "pytest<10,>=8.0",
        "triton>=3.6; sys_platform == 'never'",
    ]
    assert floors(requirements) == ["torch==2.10.*", "safetensors==0.4.5.*", "pytest==8.0.*"]
    assert {"torch==2.10.*", "pillow==10.1.*", "pytest==8.0.*"} <= set(floors(requirements_of(REPOSITORY)))


def test_copy_holds_what_git_tracks(tmp_path: Path) -> None:
    copy_working_tree(tmp_path / "source")
    assert (tmp_path / "source" / "pyproject.toml").read_bytes() == (REPOSITORY / "pyproject.toml").read_bytes()
    assert not list((tmp_path / "source").rglob("_C*.so"))


def test_table_shows_what_is_not_installed() -> None:
    text = table([{"environment": "newest", "torch": "2.14.1", "passed": "9", "failed": "0", "skipped": "1"}])
    assert text.splitlines()[2].startswith("| newest | - | 2.14.1 | - |")
    assert text.endswith("| 9 | 0 | 1 | - |")
