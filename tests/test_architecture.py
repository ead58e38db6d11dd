"""What keeps the code readable: who may import whom, sizes, and imports that cost little.

`ALLOWED` is the table of imports; a new package or a new arrow is a decision, made here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "jaxalign").rglob("*.py"))
OPS = sorted((ROOT / "jaxalign" / "ops").glob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "experiments").rglob("*.py"))]

# The parts of jaxalign that a part may import: a package with all its modules, or one module.
ALLOWED = {
    "core": ["core"],
    "ops": ["core.types", "ops"],
    "models": ["core.types", "core.state", "ops", "models"],
    "envs": ["core.types", "ops", "envs"],
    "rewards": ["core.types", "core.distributed", "ops", "rewards"],
    # Generators of data sets let an oracle act in environments: hence envs and rollout.
    "data": ["core.types", "core.checkpoint", "ops", "rewards", "envs", "rollout", "data"],
    "rollout": ["core.types", "ops", "rollout"],
    "methods": ["core", "ops", "models", "envs", "data", "rewards", "rollout"],
}

# Outside packages that only some files may import.
CONFINED = {
    "flax.linen": ["jaxalign/models/"],
    "torch": ["experiments/bench", "experiments/stable_diffusion_report.py"],
    "transformers": ["jaxalign/models/", "jaxalign/data/", "experiments/bench"],
    "diffusers": [
        "jaxalign/models/",
        "jaxalign/data/",
        "experiments/bench",
        "experiments/stable_diffusion_report.py",
    ],
    "dm_control": ["jaxalign/envs/mujoco"],
    "gymnasium": [
        "jaxalign/data/ogbench_play.py",
        "jaxalign/envs/mujoco",
        "experiments/real_envs.py",
    ],
    "mujoco": ["jaxalign/envs/mujoco"],
    "ogbench": ["jaxalign/data/ogbench_play.py", "experiments/real_envs.py"],
}

# Outside packages that come with an extra or import slowly: never at the top of a module.
LAZY = [
    *("datasets", "diffusers", "matplotlib", "mlxtend", "sklearn"),
    *("dm_control", "gymnasium", "mujoco", "ogbench"),
    *("tensorboardX", "tokenizers", "torch", "transformers", "wandb"),
]
# These are themselves imported where they are used.
MAY_IMPORT = {
    "experiments/plots.py": "matplotlib",
    "experiments/maze_plots.py": "matplotlib",  # through plots
    "experiments/skill_plots.py": "matplotlib",
    "experiments/bench_torch.py": "torch",
    "experiments/bench_rlhf_torch.py": "torch",
    "experiments/bench_sd_torch.py": "torch diffusers",
}

MODULE_LINES, FUNCTION_LINES = 450, 60
LONGER_MODULES = {
    "jaxalign/methods/b2_diffurl.py": 670,  # a method is one file, to be read from top to bottom
    "jaxalign/methods/r3hf.py": 490,
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check():
    parts = {path.parent.name for path in PACKAGE}
    assert {"core", "ops", "models", "rollout", "data", "rewards", "methods"} <= parts


# --- imports -------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that the code names, `from a import b` as "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows: write the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def wrong_arrows(name: str, tree: ast.AST) -> list[str]:
    """The imports of file `name` that `ALLOWED` forbids."""
    inside = [module for module in imports(tree) if within(module, "jaxalign")]
    wrong = [m for m in imports(tree) if within(m, "experiments") or within(m, "tests")]
    if not name.startswith("jaxalign/"):
        return [module for module in wrong if not within(module, "experiments")]
    part = name.split("/")[1]
    if part.endswith(".py"):  # jaxalign/__init__.py belongs to no part
        return wrong + inside
    allowed = [f"jaxalign.{other}" for other in ALLOWED[part]]
    return wrong + [m for m in inside if not any(within(m, package) for package in allowed)]


def confined_imports(name: str, tree: ast.AST) -> list[str]:
    """The imports of file `name` that `CONFINED` forbids."""
    return [
        module
        for module in imports(tree)
        for package, homes in CONFINED.items()
        if within(module, package) and not name.startswith(tuple(homes))
    ]


def heavy_imports(name: str, tree: ast.Module) -> list[str]:
    """The imports of file `name` at module level that `LAZY` forbids."""
    lazy = [package for package in LAZY if package not in MAY_IMPORT.get(name, "").split()]
    return [
        module
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        for module in imports(statement)
        if any(within(module, package) for package in lazy)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_follow_the_table(path: Path):
    name, tree = relative(path), ast.parse(path.read_text(encoding="utf-8"))
    assert not wrong_arrows(name, tree), "see ALLOWED in this file"
    assert not confined_imports(name, tree), "see CONFINED in this file"
    assert not heavy_imports(name, tree), "see LAZY in this file: import it where it is used"


@pytest.mark.parametrize("path", OPS, ids=relative)
def test_ops_are_arithmetic_on_arrays(path: Path):
    known = {*sys.stdlib_module_names, "jax", "numpy", "jaxalign"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {module.split(".")[0] for module in imports(tree)} <= known


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("jaxalign/ops/a.py", "from jaxalign.core import loop"),
        ("jaxalign/core/a.py", "import jaxalign.models.lora"),
        ("jaxalign/core/a.py", "def f():\n    from jaxalign.methods import b"),
        ("jaxalign/rollout/a.py", "from jaxalign.models.lora import effective"),
        ("jaxalign/methods/a.py", "from jaxalign.methods import b"),
        ("jaxalign/methods/a.py", "from experiments import cli"),
        ("jaxalign/a.py", "from jaxalign.core import types"),
    ],
)
def test_a_wrong_arrow_is_seen(name: str, line: str):
    assert wrong_arrows(name, ast.parse(line))


def test_a_package_out_of_its_place_is_seen():
    assert confined_imports("jaxalign/core/a.py", ast.parse("import flax.linen as nn"))
    assert confined_imports("jaxalign/core/a.py", ast.parse("from flax import linen"))
    assert confined_imports("experiments/a.py", ast.parse("def f():\n    import torch"))
    assert heavy_imports("jaxalign/data/a.py", ast.parse("try:\n    import mlxtend\nfinally: 1"))
    assert not heavy_imports("jaxalign/data/a.py", ast.parse("def f():\n    import mlxtend"))


# --- sizes ---------------------------------------------------------------------------------------


def long_functions(tree: ast.AST) -> Iterator[str]:
    """Functions whose body, docstring apart, has more lines than a reader sees at once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_modules_and_functions_are_short(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGER_MODULES.get(relative(path), MODULE_LINES)
    assert not list(long_functions(ast.parse(text)))


# --- importing -----------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, socket, sys

def refuse(*_, **__):
    raise AssertionError("an import reaches for the network")

socket.socket.connect = socket.getaddrinfo = refuse
for module in sys.argv[2:]:
    importlib.import_module(module)
print(*sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[1].split(","))))

# Refused once a computation has started a device, which must be left to the run itself.
import jax
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""


def test_importing_everything_is_quick_offline_and_light():
    names = [
        relative(path).removesuffix(".py") for path in SOURCES if relative(path) not in MAY_IMPORT
    ]
    modules = [name.replace("/", ".").removesuffix(".__init__") for name in names]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(LAZY), *modules],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "imported with the package, though only some runs need it"
