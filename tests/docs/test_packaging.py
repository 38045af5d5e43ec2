"""What is installed is complete: the wheel holds every package and every data file, and works from anywhere."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import planner

ROOT = Path(__file__).resolve().parent.parent.parent
FITS = ("fits", "meta-llama/Llama-3.1-8B", "--gpu", "rtx-4090", "--method", "qlora")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the interpreter outside the checkout, finding modules only in `path` and what is installed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def config() -> configparser.RawConfigParser:
    """setup.cfg."""
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what is in the checkout, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools leaves build/ and *.egg-info in the source tree: build elsewhere, as two tests may run at once.
    source = folder / "source"
    source.mkdir()
    for name in ("loraplan", "planner", "calibrate", "data", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    done = run("-m", "pip", "wheel", "-q", source, "--no-deps", "--no-build-isolation", "-w", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_setup_cfg_lists_every_package() -> None:
    here = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for top in ("loraplan", "planner", "calibrate")
        for p in ROOT.glob(f"{top}/**/*.py")
    }
    assert set(config()["options"]["packages"].split()) == here | {"planner.data"}


@pytest.mark.extra
@pytest.mark.slow
def test_the_wheel_holds_all_modules_and_data(wheel: Path) -> None:
    assert wheel.name.startswith(f"loraplan-{planner.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        p.relative_to(ROOT).as_posix()
        for top in ("loraplan", "planner", "calibrate")
        for p in ROOT.glob(f"{top}/**/*.py")
    }
    data = {f"planner/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "data").rglob("*") if p.is_file()}
    assert data
    assert names >= modules | data | {"planner/py.typed"}, sorted((modules | data) - names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "build/"))]


@pytest.mark.extra
@pytest.mark.slow
def test_the_wheel_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    done = run("-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = "import planner.base.data_files as c; print(c.__file__); print(c.data_path('gpus.json'))"
    done = run("-c", where, cwd=tmp_path, path=target)
    assert [line.startswith(str(target)) for line in done.stdout.splitlines()] == [True, True], (
        done.stdout + done.stderr
    )
    done = run("-m", "planner.cli.main", *FITS, cwd=tmp_path, path=target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Llama-3.1-8B" in done.stdout


@pytest.mark.slow
def test_a_checkout_works_from_anywhere(tmp_path: Path) -> None:
    done = run("-m", "planner.cli.main", *FITS, cwd=tmp_path, path=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_installed_command_works_from_anywhere(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / ("loraplan.exe" if sys.platform == "win32" else "loraplan")
    if not command.exists():
        pytest.skip("run from a checkout that is not installed")
    done = subprocess.run([command, *FITS], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
