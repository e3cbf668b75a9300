"""The house holds its walls: who imports whom, which names exist, and that the README shows the real tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# layer -> what it may import of the package, itself aside
BELOW_PIPELINE = {
    "types",
    "user_text",
    "environment",
    "schedule",
    "kernels",
    "data",
    "objectives",
    "models",
    "training",
    "evaluation",
    "report",
}
ALLOWED = {
    "kernels": set(),
    "testing": set(),
    "types": set(),
    "user_text": {"types"},
    "environment": {"types"},
    "cores": set(),
    "schedule": {"types"},
    "data": {"types", "user_text"},
    "objectives": {"types"},
    "report": {"types", "user_text"},
    "models": {"types", "user_text", "kernels"},
    "evaluation": {"types", "user_text", "kernels", "data", "objectives", "models"},
    "training": {"types", "user_text", "schedule", "kernels", "data", "objectives", "models", "evaluation"},
    "recipes": {"types", "data", "objectives", "models", "training"},
    "pipeline": BELOW_PIPELINE,
    "prime": {"types", "kernels", "training"},
    "doctor": BELOW_PIPELINE | {"cores", "pipeline"},
    "cli": BELOW_PIPELINE | {"cores", "pipeline", "doctor", "prime", "recipes"},
    "__init__": BELOW_PIPELINE | {"pipeline", "recipes"},
}
BANNED = {"utils", "common", "helpers", "misc", "base", "manager", "handler"}


def python_files():
    found = sorted((ROOT / "antlm_fast").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
    return [path.relative_to(ROOT) for path in found]


def layer_of(path):
    parts = path.with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported_layers(path):
    layers = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.name.endswith("_antlm_bert.py"), f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        layers |= {name.split(".")[1] for name in names if name.startswith("antlm_fast.")}
    return layers


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_imports_follow_the_arrows(path):
    layer = layer_of(path)
    extra = imported_layers(path) - ALLOWED[layer] - {layer}
    assert not extra, f"{path} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_a_file_has_one_reason_to_exist(path):
    assert path.stem not in BANNED
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{path} wants to be two files"
    if (
        path.name == "__init__.py"
        and path.parts[:2] != ("antlm_fast", "kernels")
        and path.parts != ("antlm_fast", path.name)
    ):
        body = ast.parse(text).body
        assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for node in body), path


def test_kernels_folder_cannot_be_imported_by_its_own_name():
    """transformers imports a package called kernels where it finds one; ours must never be taken for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def fresh(code, *, block=()):
    """Runs code in a new process in which some packages cannot be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in block)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; {blocked}{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "numpy", "triton", "transformers", "tokenizers", "matplotlib")
    done = fresh(f"import antlm_fast; print(sorted(set(sys.modules) & set({heavy})))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_kernels_and_models_load_no_triton_before_a_gpu_asks_for_it():
    heavy = ("triton", "transformers", "tokenizers", "matplotlib")
    done = fresh(
        "import torch, antlm_fast, antlm_fast.kernels.attention, antlm_fast.models, antlm_fast.doctor; "
        "q = torch.ones(1, 4, 2, 16); antlm_fast.attention(q, q, q, causal=True, impl='torch'); "
        f"print(sorted(set(sys.modules) & set({heavy})))"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_kernels_and_models_need_only_torch():
    optional = ("triton", "transformers", "tokenizers", "tqdm", "matplotlib", "datasets", "tensorboard")
    done = fresh(
        "import torch, antlm_fast; q = torch.ones(1, 4, 2, 16); "
        "out = antlm_fast.attention(q, q, q, causal=True); "
        "loss = antlm_fast.linear_cross_entropy(torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 1, -100])); "
        "model = antlm_fast.models.BabyLlama(antlm_fast.models.BabyLlamaConfig(vocab_size=9, hidden_size=8, "
        "intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)); "
        "logits = model(torch.tensor([[1, 2, 3]]), causal=False); "
        "print(tuple(out.shape), round(loss.item(), 4), tuple(logits.shape), antlm_fast.Schedule.parse('1_CLM'))",
        block=optional,
    )
    # five equal logits: the loss is ln 5
    assert done.stdout.strip() == "(1, 4, 2, 16) 1.6094 (1, 3, 9) 1_CLM", done.stderr


def test_public_names_are_all_there():
    done = fresh(
        "import antlm_fast; missing = [n for n in antlm_fast.__all__ if getattr(antlm_fast, n, None) is None]; "
        "print(missing, set(antlm_fast.__all__) <= set(dir(antlm_fast)))"
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_readme_shows_the_tree_that_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    shown = {line.split()[0] for line in block.group(1).splitlines() if line.strip()}
    tracked = [path for path in (ROOT / "antlm_fast").iterdir() if path.name not in ("__pycache__", "py.typed")]
    there = {f"antlm_fast/{path.name}" + ("/" if path.is_dir() else "") for path in tracked}
    there |= {
        f"kernels/{path.name}" + ("/" if path.is_dir() else "")
        for path in (ROOT / "kernels").iterdir()
        if path.name != "__pycache__"
    }
    assert {name for name in shown if name.startswith(("antlm_fast/", "kernels/"))} == there


def test_the_two_commands_are_in_the_readme_and_ci_runs_the_tests():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# what makes a tensor out of nothing, and whether torch's default dtype decides where none is named
FACTORIES = {
    **dict.fromkeys(
        ("empty", "zeros", "ones", "full", "rand", "randn", "linspace", "eye", "tensor", "as_tensor"), True
    ),
    **dict.fromkeys(("arange", "randint", "randperm"), False),
}


@pytest.mark.parametrize("path", [path for path in python_files() if path.parts[0] == "kernels"], ids=str)
def test_a_kernels_memory_never_depends_on_torchs_defaults(path):
    """A buffer of another dtype or device than the code behind a pointer expects is garbage, or a crash."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        wanted = {"device", "dtype"} if FACTORIES[node.func.attr] else {"device"}
        # **options may hold both
        assert None in named or wanted <= named, f"{path}:{node.lineno}: torch.{node.func.attr} without {wanted}"
