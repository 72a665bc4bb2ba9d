"""Test that the imports between packages stay within the boundaries of DESIGN."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Both packages share these values, formats, measures and runtimes, never a network definition or the training loop.
SHARED = {
    "control_groups",
    "dataset",
    "encoding",
    "errors",
    "evaluate",
    "files",
    "lifeline",
    "ray_cluster",
    "recipes",
    "resources",
    "run",
    "runtimes",
    "store",
    "text",
}


# `app.cli` is the command line of the whole project, so it also has the commands of training. The service starts with
# `app.cli.serve`, which imports the form of commands only.
COMMAND_LINE = {"__main__", "commands", "console"}


def imported_modules(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_the_service_knows_models_only_by_their_exported_files() -> None:
    for source in (ROOT / "app").rglob("*.py"):
        allowed = SHARED | COMMAND_LINE if source.parent.name == "cli" else SHARED
        if source in (ROOT / "app" / "__main__.py", ROOT / "app" / "cli" / "serve.py"):
            allowed = SHARED | {"console"}
        for name in imported_modules(source):
            if name.startswith("training."):
                assert name.split(".")[1] in allowed, f"{source} imports {name}"


def test_training_does_not_know_the_service() -> None:
    for source in (ROOT / "training").rglob("*.py"):
        assert not any(name.split(".")[0] == "app" for name in imported_modules(source)), source


def test_torch_jit_is_used_in_one_module_only_and_in_the_code_that_runs_without_this_package() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in ("app", "training")
        for path in (ROOT / package).rglob("*.py")
        if "torch.jit." in path.read_text()
    }
    assert users == {"training/runtimes/torchscript.py", "training/trackers/mlflow_model.py"}
