"""ExpertOffloader rules that a machine can hold: sizes, who imports whom, no pickles, no machine's own paths."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = sorted(ROOT / f"{name}.py" for name in ("caption", "shard", "encode", "train", "sample", "export", "doctor"))
PACKAGE = sorted((ROOT / "wantrain").rglob("*.py"))
PRODUCT = [*COMMANDS, ROOT / "demo.py", ROOT / "setup.py", *sorted((ROOT / "assets").glob("*.py")), *PACKAGE]


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file):
    return file.relative_to(ROOT).as_posix()


@functools.cache
def imports(file, *, everywhere=True):
    """Modules that a file imports: at its top, and inside functions if `everywhere`."""
    found = set()
    for node in ast.walk(tree(file)) if everywhere else tree(file).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found


def uses(file, library):
    return any(name == library or name.startswith(f"{library}.") for name in imports(file))


#: Constructors whose keywords are a config's keys: Hydra fills them, so the constructor is the schema.
SCHEMAS = {
    target
    for file in sorted((ROOT / "conf").rglob("*.yaml"))
    for target in re.findall(r"_target_: ([\w.]+)", file.read_text())
}
MOST_PARAMETERS, MOST_LINES, MOST_FILE = 8, 80, 400


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_function_sizes(file):
    """At most eight parameters (a record holds more) and eighty lines; constructors that Hydra fills are schemas."""
    schemas = {target.rpartition(".")[2] for target in SCHEMAS}
    for owner in ast.walk(tree(file)):
        for node in ast.iter_child_nodes(owner):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            assert node.end_lineno - node.lineno < MOST_LINES, f"{name_of(file)}: {node.name}"
            if node.name == "__init__" and isinstance(owner, ast.ClassDef) and owner.name in schemas:
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            names = [each.arg for each in given if each is not None and each.arg not in {"self", "cls"}]
            assert len(names) <= MOST_PARAMETERS, f"{name_of(file)}: {node.name}({', '.join(names)})"


def test_file_sizes():
    """A file has at most 400 lines, the loop under 200, a command 105."""
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in PRODUCT}
    assert {name: count for name, count in lines.items() if count > MOST_FILE} == {}
    assert lines["wantrain/training/loop.py"] < 200
    assert {command.name: n for command in COMMANDS if (n := lines[command.name]) > 105} == {}


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_no_pickle_or_eval(file):
    """No file reads or writes pickles, or runs text.

    But for one: official weights are pickles, read by torch's loader that runs no code from them.
    """
    weights = name_of(file) == "wantrain/models/formats/weights.py"
    assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {
        name.split(".")[0] for name in imports(file)
    }
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            call = f"{node.value.id}.{node.attr}"
            assert call not in {"torch.save", "yaml.load", "yaml.unsafe_load", "os.system"}, call
            assert call != "torch.load" or weights, call
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords}
            assert "allow_pickle" not in keywords
            loads = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load"
            assert loads == ("weights_only" in keywords) and (
                not loads or ast.unparse(keywords["weights_only"]) == "True"
            )
            shell = keywords.get("shell")
            assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False)
            assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"})


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_exception_handlers(file):
    """No handler catches everything and goes on: what is caught in general is raised again, in words, or handed on."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(file)}:{node.lineno}: bare except"
            general = isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            kept = any(isinstance(inner, ast.Raise) for inner in ast.walk(node)) or (
                node.name is not None
                and any(isinstance(inner, ast.Name) and inner.id == node.name for inner in ast.walk(node))
            )
            assert not general or kept, f"{name_of(file)}:{node.lineno}"
            assert [type(inner) for inner in node.body] != [ast.Pass], f"{name_of(file)}:{node.lineno}"


#: The judgement of a composed config.
CHECKS = ("wantrain/checks/__init__.py", "wantrain/checks/updates.py", "wantrain/checks/schedules.py")


def test_library_imports():
    """Each library is imported by its own modules only."""
    rooms = {
        "hydra": {"wantrain/config.py"},
        "omegaconf": {
            "wantrain/config.py",
            *CHECKS,
            "wantrain/auto.py",
            *(command.name for command in COMMANDS),
        },
        "accelerate": {
            *(f"wantrain/training/engine/{name}.py" for name in ("accelerator", "engine", "placement")),
            "wantrain/training/monitoring/trackers.py",  # its classes for Trackio and MLflow
        },
        "deepspeed": {"wantrain/training/engine/zero.py"},
        "peft": {"wantrain/models/adapters.py"},
        "bitsandbytes": {"wantrain/models/quantize.py"},
        "prodigyopt": {"wantrain/training/engine/adaptive.py"},
        "schedulefree": {"wantrain/training/engine/adaptive.py"},
        "jinja2": {"wantrain/page/__init__.py"},
        "wandb": {"wantrain/training/monitoring/trackers.py"},
        "decord": {"wantrain/data/footage/reader.py"},
        "av": {"wantrain/data/footage/forward.py", "wantrain/data/footage/inspection.py"},
        "fsspec": {f"wantrain/data/{name}.py" for name in ("remote", "upload", "footage/sources")},
        "webdataset": {"wantrain/data/footage/video_shards.py"},
        "transformers": {
            "wantrain/models/captioner.py",
            "wantrain/models/text.py",
            "wantrain/models/formats/loading.py",
            "assets/make_tiny_text_encoder.py",
        },
        "diffusers": set(),
        "scipy": set(),
        "wantrain.config": {*CHECKS, "wantrain/auto.py", *(command.name for command in COMMANDS)},
        "wantrain.checks": {CHECKS[0], *(command.name for command in COMMANDS)},
    }
    for library, allowed in rooms.items():
        assert {name_of(file) for file in PRODUCT if uses(file, library)} <= allowed, library


def test_light_modules():
    """geometry imports the standard library only; config and the commands alone use Hydra's objects."""
    standard = set(sys.stdlib_module_names) | {"__future__"}
    assert {name.split(".")[0] for name in imports(ROOT / "wantrain/geometry.py")} <= standard
    for file in PACKAGE:
        allowed = file.name in {"config.py", "auto.py"} or name_of(file) in CHECKS
        assert allowed or "DictConfig" not in file.read_text(), name_of(file)


def test_import_contracts():
    """No import contract is broken."""
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 broken" in ended.stdout


def test_sampling_without_training():
    """Neither command imports wantrain.training, nor does anything that they import."""
    code = "import sys, sample, export; print([name for name in sys.modules if name.startswith('wantrain.training')])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_no_machine_paths():
    """No tracked file names a path of somebody's machine."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(rb"(?<![\w.])/(?:" + b"|".join([b"work", b"root", b"home/", b"Users/", b"mnt/"]) + rb")[/\w]")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".safetensors", ".png", ".mp4"}:
            found += [f"{name}: {match.group()!r}" for match in pattern.finditer(path.read_bytes())]
    assert found == []


def test_module_docstrings():
    """Every file opens with a docstring that says what it is."""
    for file in PRODUCT:
        said = ast.get_docstring(tree(file))
        assert said or not file.read_text().strip(), name_of(file)
        assert not said or said.splitlines()[0].rstrip().endswith((".", ":", ",", "?")) or "\n" in said, name_of(file)
