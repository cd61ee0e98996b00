"Restoring files must not wait for torch: what an import brings, not how long it takes."
import subprocess
import sys

import pytest

heavy = ("torch", "transformers", "numpy", "matplotlib", "einops")


@pytest.mark.parametrize("module, absent", [(m, heavy) for m in ("restore", "checkpoints", "families", "moves", "note", "in_place", "inspection", "adapters", "hub", "cli")])
def test_light_imports(module, absent):
    code = f"import sys, qkrestore_nb.{module}; print(*[m for m in {absent} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_restoring_folders_does_not_import_torch(pair, tmp_path):
    code = ("import sys\nfrom qkrestore_nb.cli import main\n"
            "try: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
            "assert not {'torch', 'transformers', 'matplotlib', 'einops'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code, "restore", *map(str, pair), str(tmp_path / "out")], check=True, stdout=subprocess.DEVNULL)
