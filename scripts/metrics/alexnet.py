"""The weights that LPIPS stands on: AlexNet's five convolutions and LPIPS's five heads, read and checked.

`LPIPS3D` reads them from models/lpips_alex.safetensors of the bundle.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scripts.conventions import ROOT
from scripts.run import InputError

__all__ = ["CONVOLUTIONS", "DEFAULT_WEIGHTS", "read_weights"]

DEFAULT_WEIGHTS = ROOT / "models" / "lpips_alex.safetensors"
CONVOLUTIONS = {  # number in torchvision's `features`: out, in, kernel, kernel
    0: (64, 3, 11, 11),  # stride 4, padding 2
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read and check the weights.

    Args:
        path: a safetensors file.

    Returns:
        Name to tensor, float32.

    Raises:
        InputError: the file is missing, damaged, or holds other weights.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; LPIPS needs models/lpips_alex.safetensors of the bundle.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); copy it from the bundle anew.") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (name, shape) in enumerate((f"features.{n}", shape) for n, shape in CONVOLUTIONS.items()):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1], f"lin{layer}.weight": (1, shape[0], 1, 1)}
    wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        raise InputError(
            f"{path} does not hold LPIPS's AlexNet weights ({', '.join(wrong)} missing or of another shape); "
            "use models/lpips_alex.safetensors of the bundle."
        )
    return {name: tensors[name].float() for name in shapes}
