"""Loaded once by the server of tests/fault_injection.py: what every job imports, so that processes start at once."""

from importlib import import_module
from pathlib import Path

for path in sorted(Path(__file__).parents[1].glob("scripts/[a-z]*.py")):
    import_module(f"scripts.{path.stem}")
for name in ("monai.bundle.scripts", "fire", "torch.utils.tensorboard", "monai.engines", "monai.handlers"):
    import_module(name)
