"""Who may import whom, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("data", "moe", "model", "cache", "compression", "scheduling", "simulation", "evaluation", "training", "jobs")
ROOMS += ("classic", "presses")
COMMON = {
    "errors",
    "collectives",
    "registry",
    "files",
    "recipes",
    "schema",
    "components",
    "strict_yaml",
    "runs",
    "telemetry",
    "__init__",
    "observation",
}
MAY = {
    "compression": {"pikv_kernels"},
    "scheduling": {"pikv_kernels", "moe"},
    "data": {"simulation"},
    "simulation": set(),
    "simulation/attention": {"cache", "scheduling"},
    "moe": {"pikv_kernels"},
    "cache": {"compression", "scheduling", "pikv_kernels", "simulation"},
    "model": {"moe", "cache", "pikv_kernels"},
    "training": {"model", "moe", "cache", "data", "evaluation", "scheduling", "pikv_kernels"},
    "evaluation": {"model", "cache", "data", "compression", "scheduling"},
    "classic": {"model", "cache", "compression", "scheduling"},
    "presses": {"cache", "compression", "scheduling"},
    "jobs": {*ROOMS} - {"jobs", "classic", "presses"},
}


# Replays of token policies, which are torch's; what reads and writes their traces is not.
WITH_TORCH = ("pikv_core/simulation/attention/replay.py",)


def room_of(file):
    """Return the room that a file is in, or the room within it that may more."""
    parts = file.relative_to(ROOT / "pikv_core").parts
    inner = "/".join(parts[:2])
    return inner if inner in MAY else parts[0]


def imports(file):
    """Yield (module, whether it is imported only for type checking)."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) in typing_only


def test_rooms_import_only_what_they_may():
    wrong = []
    for room in ROOMS:
        for file in (ROOT / "pikv_core" / room).rglob("*.py"):
            for name, _ in imports(file):
                parts = name.split(".")
                target = parts[1] if parts[0] == "pikv_core" and len(parts) > 1 else parts[0]
                ours = parts[0] in ("pikv_core", "pikv_kernels")
                if ours and target not in {room, *MAY[room_of(file)], *COMMON, "__version__"}:
                    wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_rooms():
    homes = {
        "typer": ("pikv_cli",),
        "rich": ("pikv_cli",),
        "triton": ("kernels",),
        "tensorboard": ("pikv_core/telemetry.py",),
        "kvpress": ("pikv_core/presses",),
        "pikv_cli": ("pikv_cli",),
        "tests": (),
    }
    wrong = []
    for folder in ("pikv_cli", "pikv_core", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for name, _ in imports(file):
                home = homes.get(name.split(".")[0])
                place = file.relative_to(ROOT).as_posix()
                if home is not None and not place.startswith(home):
                    wrong.append(f"{place} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_simulation_and_the_data_never_import_torch():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for room in ("simulation", "data")
        for file in (ROOT / "pikv_core" / room).rglob("*.py")
        for name, typing_only in imports(file)
        if name.split(".")[0] in ("torch", "transformers") and not typing_only
        if file.relative_to(ROOT).as_posix() not in WITH_TORCH
    ]
    assert not wrong, "\n".join(wrong)
