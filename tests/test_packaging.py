"""The wheel, installed elsewhere, works without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import guided_diffusion

ROOT = Path(__file__).parent.parent
FILES = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
FOLDERS = ["guided_diffusion", "evaluations"]


def call(*command: object, folder: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, built with the setuptools that is here."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for file in filter(Path.exists, map(ROOT.joinpath, FILES)):
        shutil.copy(file, source)
    for package in filter(Path.exists, map(ROOT.joinpath, FOLDERS)):
        shutil.copytree(package, source / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True, env=environment)
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_marker_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("guided_diffusion/**/*.py")}
    assert sources | {"guided_diffusion/py.typed"} <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert tops - {"evaluations"} == {"guided_diffusion", f"guided_diffusion-{guided_diffusion.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_the_installed_wheel_runs_its_console_command_outside_the_checkout(wheel, tmp_path):
    """The environment sees this one's torch and nothing else of it: not the checkout, not an editable install."""
    venv.create(tmp_path / "env", with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "env")})
    own = Path(paths["purelib"])
    python = tmp_path / "env" / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=tmp_path)
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = "import guided_diffusion as g, guided_diffusion.dist_util; print(g.__version__, g.__file__)"
    version, file = call(python, "-c", where, folder=tmp_path).split()
    assert version == guided_diffusion.__version__
    assert Path(file).is_relative_to(own)
    for command in ([tmp_path / "env" / "bin" / "guided-diffusion"], [python, "-m", "guided_diffusion"]):
        text = call(*command, "--help", folder=tmp_path)
        assert "image_train" in text
        assert "image_sample" in text


def test_nothing_heavy_is_imported_by_the_package_alone():
    code = "import sys, guided_diffusion; print({'torch', 'numpy', 'argparse'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_what_make_installs_is_pinned():
    """wandb is not: no test runs it."""
    wanted = set(re.findall(r'"([\w-]+)>=', (ROOT / "setup.py").read_text()))
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "pytest", "mpi4py"} <= wanted
    assert wanted - pinned == {"wandb"}
