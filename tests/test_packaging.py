"""What is installed, what imports what, and that the built archives work elsewhere."""

import ast
import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tensorlayers"

# Left may import right; the members of one group do not import each other.
ORDER = [
    {"__main__"},
    {"cli"},
    {"pictures"},
    {"demo", "gradual", "tradeoffs"},
    {"evaluate", "convert", "heal", "texts"},
    {"decide"},
    {"advice"},
    {"keys"},
    {"sequential"},
    {"calibrate", "distillation", "layer_times"},
    {"watch"},
    {"budget"},
    {"serialize", "scan", "interop"},
    {"plan"},
    {"entry"},
    {"regularize", "explain", "learning_rates"},
    {"surgery", "hub", "table", "factors", "figures"},
    {"fold", "optimizer", "batches", "healing"},
    {"layers"},
    {"dispatch"},
    {"measure", "tune"},
    {"products", "small"},
    {"functional", "lookup", "autograd", "decision"},
    {"lowering", "fused", "fused_rebuild", "fused_khatri_rao"},
    {"step_cost", "rebuild"},
    {"orders"},
    {"matmul"},
    {"codegen", "slices"},
    {"program", "conv_chunks"},
    {"convolution", "gather"},
    {"fused_lookup"},
    {"lookup_plan"},
    {"conv_search", "measure_conv", "measure_gemm"},
    {"conv_cost", "conv_maps"},
    {"formats", "moments"},
    {"rules"},
    {"spectra"},
    {"fit", "metric"},
    {"als"},
    {"normal_equations"},
    {"decompose", "rank", "rounding", "tensorize"},
    {"group", "bond_changes"},
    {"adjoint", "chain"},
    {"backend"},
    {"contraction", "precision"},
    {"launch"},
    {"launch_tables"},
    {"cost"},
    {"network", "machine", "timing", "activation", "training"},
    {"errors", "files", "schedule", "randomness"},
]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part(path):
    """The top part of a module below the package: formats/cp.py -> formats."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path):
    """The parts of this package that a module imports, from relative and absolute imports at any depth of code."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("tensorlayers."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tensorlayers.")]


def test_imports_run_one_way():
    rank = {name: position for position, group in enumerate(ORDER) for name in group}
    wrong = []
    for path in modules():
        source = part(path)
        if source in ("__init__", "testing"):
            continue
        for target in imported(path):
            if target != "__version__" and not rank[source] < rank[target]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong


def test_every_module_has_its_place_in_the_order():
    assert {part(path) for path in modules()} == set().union(*ORDER, {"__init__", "testing"})


def test_nothing_imports_the_kernels_or_the_tests_helpers():
    for path in modules():
        assert not {"kernels", "testing"} & set(imported(path)), path


def test_network_and_cost_import_no_torch():
    for name in ("network", "cost", "rank", "tensorize", "errors"):
        assert "torch" not in {
            node.names[0].name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }


def test_listed_packages_are_those_on_disk():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    disk = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert listed == disk | {"tensorlayers.kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_declared_dependencies_are_those_imported():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'^    "([a-z]+)>=', text, re.M))
    found = set()
    for path in [*modules(), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    third = found - set(sys.stdlib_module_names) - {"tensorlayers"}
    assert third == declared | {"matplotlib"}  # an extra: what draws says so where it is missing


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_import_is_light_and_switches_nothing():
    code = """
import sys, tensorly
before = tensorly.get_backend()
import tensorlayers
assert tensorly.get_backend() == before == "numpy"
heavy = {"triton", "transformers", "tltorch", "scipy.stats", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    run(sys.executable, "-c", code, cwd=ROOT)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A source distribution, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    clean = tmp_path_factory.mktemp("source") / "tree"
    clean.mkdir()
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            (clean / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(clean), cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_archives_hold_every_module(archives):
    source, wheel = archives
    files = [*modules(), PACKAGE / "py.typed", *(PACKAGE / "machines").glob("*.json")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted | {f"tensorlayers/kernels/{name}" for name in kernels} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tensorlayers"}
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert wanted | {f"kernels/{name}" for name in kernels} <= inside


@pytest.mark.parametrize("kind", [0, 1], ids=["sdist", "wheel"])
def test_archives_install_and_work_elsewhere(archives, kind, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    run(*pip, "--no-build-isolation", "--target", str(target), str(archives[kind]), cwd=tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import torch, tensorlayers, importlib.util
assert tensorlayers.__file__.startswith({str(target)!r}), tensorlayers.__file__
spec = importlib.util.find_spec("tensorlayers.kernels.chain")
assert spec.origin.startswith({str(target)!r}), spec.origin
layer = tensorlayers.FactorizedLinear(64, 64, format=tensorlayers.TT(4))
assert layer(torch.zeros(2, 64)).shape == (2, 64)
"""
    run(sys.executable, "-I", "-c", code, cwd=tmp_path)


def test_the_top_level_is_as_laid_down():
    for name in (
        "setup.cfg",
        "pyproject.toml",
        "tensorlayers",
        "kernels",
        "tests",
        "notebooks",
        "LICENSE",
        "README.md",
    ):
        assert (ROOT / name).exists(), name
