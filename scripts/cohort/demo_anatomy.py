"""What every demo subject is made from: nilearn's tissue maps, and a head drawn around them.

`demo` loads it once and deforms it for each subject. Of the head, skull and scalp follow the
distance to the brain, all else is a list of ellipsoids and tubes in template millimetres, filled with the brightness
of muscle, fat, bone, marrow or air. It is anatomy at a glance, for making software run, not for measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

__all__ = ["TemplateMap", "Templates", "draw_head", "load_templates"]

SEED = 152  # of the head's textures
STEP = 2  # mm, of the head
LOW, HIGH = (-98, -146, -166), (100, 130, 120)  # mm; holds the template's own field of view
AIR, CORTEX, TEETH, CSF, MUSCLE, SKIN, MARROW, FAT = 0.02, 0.06, 0.1, 0.15, 0.4, 0.5, 0.55, 0.92  # white matter is 1

# Name, centre and radii in mm (drawn on both sides where x is not 0), brightness. Later ones lie over earlier ones.
ORGANS = (
    ("fat of the orbit", (33, 58, -36), (17, 22, 16), FAT),
    ("eye muscle, medial", (23, 55, -37), (2.5, 15, 5), MUSCLE),
    ("eye muscle, lateral", (42, 55, -37), (2.5, 15, 5), MUSCLE),
    ("optic nerve", (31, 48, -35), (2.5, 16, 2.5), MARROW),
    ("eyeball", (33, 67, -36), (12, 12, 12), CSF),
    ("lens", (33, 76, -36), (5, 2.5, 5), SKIN),
    ("fat of the cheek", (47, 52, -74), (9, 15, 17), FAT),
    ("masseter", (53, 28, -86), (8, 15, 24), MUSCLE),
    ("tongue", (0, 48, -94), (22, 32, 15), 0.5),
    ("floor of the mouth", (0, 52, -112), (16, 26, 5), FAT),
    ("maxillary sinus", (29, 56, -66), (12, 16, 15), AIR),
    ("frontal sinus", (10, 80, -16), (9, 4, 9), AIR),
    ("sphenoid sinus", (8, 20, -38), (8, 12, 8), AIR),
    ("nasal cavity", (8, 64, -60), (6, 32, 20), AIR),
    ("turbinate, lower", (8, 60, -70), (3, 22, 3), SKIN),
    ("turbinate, middle", (8, 56, -58), (3, 20, 3), SKIN),
    ("nostril", (7, 96, -66), (4, 8, 5), AIR),
    ("nasopharynx", (0, 14, -70), (12, 12, 16), AIR),
    ("mouth", (0, 70, -84), (20, 18, 2.5), AIR),
    ("throat", (0, 5, -112), (10, 6, 34), AIR),
    ("airway below", (0, 2, -160), (9, 9, 32), AIR),
    ("mastoid", (55, -32, -50), (9, 14, 13), CORTEX),
    ("ear canal", (72, -22, -40), (12, 3, 3), AIR),
    ("jugular vein", (32, -14, -120), (6, 5, 60), TEETH),
    ("carotid artery", (26, -4, -120), (4, 4, 60), TEETH),
)


@dataclass(frozen=True)
class TemplateMap:
    """A float32 volume (x, y, z) in template space: world = origin + step * index, in mm, RAS."""

    data: np.ndarray
    origin: tuple[float, ...]
    step: float

    def sample(self, points: np.ndarray) -> np.ndarray:
        """Linear interpolation at world points (3, X, Y, Z) in mm, zero outside; float32 (X, Y, Z)."""
        index = (points - np.array(self.origin, np.float32)[:, None, None, None]) / np.float32(self.step)
        return ndimage.map_coordinates(self.data, index, output=np.float32, order=1)


@dataclass(frozen=True)
class Templates:
    """What every subject is made from: shares of tissue and the brain's mask in [0, 1], the head around the brain in
    units of white matter, and the pull towards the ventricles (3 axes, at most 1) that makes them larger."""

    gm: TemplateMap
    wm: TemplateMap
    mask: TemplateMap
    head: TemplateMap
    pull: tuple[TemplateMap, ...]


def load_templates() -> Templates:
    """Read nilearn's tissue maps (1 mm) and draw the head around them.

    Source: V. Fonov et al., NeuroImage 54(1), 2011, 313-327 (ICBM 152, nonlinear, 2009), as nilearn packs it.
    """
    from nilearn import (
        datasets,  # two seconds of importing, so only when scans are made
    )

    image = datasets.load_mni152_brain_mask(resolution=1)
    x, y, z = (float(value) for value in image.affine[:3, 3])
    images = (datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1), image)
    gm, wm, mask = (TemplateMap(np.asarray(each.dataobj, np.float32), (x, y, z), 1.0) for each in images)

    dark = (mask.data > 0) & (gm.data + wm.data < 0.5)
    dark[:, :, : int(-12 - z)] = dark[:, :, int(36 - z) :] = False  # the cisterns below, the sulci above
    dark[: int(-42 - x)] = dark[int(43 - x) :] = False
    dark[:, : int(-55 - y)] = dark[:, int(45 - y) :] = False
    parts, _ = ndimage.label(dark)
    ventricles = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    slopes = np.stack(np.gradient(ndimage.gaussian_filter(ventricles.astype(np.float32), 5)[::4, ::4, ::4]))
    slopes /= np.sqrt((slopes**2).sum(0)).max()
    pull = tuple(TemplateMap(slope, (x, y, z), 4.0) for slope in slopes)
    return Templates(gm, wm, mask, draw_head(mask.data > 0, (x, y, z)), pull)


def draw_head(brain: np.ndarray, origin: Sequence[float]) -> TemplateMap:
    """Draw what surrounds a brain.

    Args:
        brain: mask (x, y, z) of 1 mm, RAS, in template space.
        origin: world point of its first voxel, mm.

    Returns:
        Brightness at 2 mm in units of white matter: CSF inside the brain, zero in the air around.
    """
    across, y, z = np.ogrid[tuple(slice(low, high, STEP) for low, high in zip(LOW, HIGH, strict=True))]
    x, y, z = np.abs(across).astype(np.float32), y.astype(np.float32), z.astype(np.float32)
    shape = np.broadcast_shapes(x.shape, y.shape, z.shape)
    noise = _Noise(shape)

    inside = np.zeros(shape, np.float32)
    start = [int(first - low) // STEP for first, low in zip(origin, LOW, strict=True)]
    half = brain[::STEP, ::STEP, ::STEP]
    inside[tuple(slice(first, first + size) for first, size in zip(start, half.shape, strict=True))] = half
    far = STEP * ndimage.distance_transform_edt(ndimage.gaussian_filter(inside, 2.5) < 0.4).astype(np.float32)  # mm

    spine = y + 29 + 0.12 * (z + 60)  # from the vertebrae's centre; the neck leans back towards the chest
    width = 56 + np.maximum(0, -112 - z) * 0.7  # shoulders
    neck = np.maximum((np.hypot(x / width, (spine + 4) / 60) - 1) * 56, z + 45)
    solids = [far - 14 - noise(14), neck, _ball(x, y, z, (0, 36, -62), (66, 62, 58))]
    solids += [_ball(x, y, z, (0, 62, -106), (40, 36, 26)), _ball(x, y, z, (84, -26, -34), (7, 16, 26))]
    solids += [_ball(x, y, z, (0, 99, -58), (14, 15, 11)), _ball(x, y, z, (0, 93, -42), (8, 12, 20))]
    solids += [_ball(x, y, z, (0, 90, -84), (22, 10, 12)), _ball(x, y, z, (0, 88, -114), (16, 10, 12))]
    # Joined smoothly: the logarithm of summed exponentials rounds the creases over some 6 mm.
    body = sum(np.exp(np.clip(-solid / 6, -9, 9)) for solid in solids) > 1
    deep = STEP * ndimage.distance_transform_edt(np.pad(body, ((0, 0), (0, 0), (1, 0)), mode="edge"))[:, :, 1:]

    sheets = np.abs(noise((5, 5, 18))) < 0.13  # fat between the muscles, which run down the neck
    head = np.where(sheets, 0.75, MUSCLE + 0.04 * noise(2)).astype(np.float32)
    head[deep < 5.5 + 1.2 * noise(10) + np.clip((-40 - z) / 20, 0, 4)] = FAT
    head[deep < 2.5] = SKIN
    head[far < 3] = CSF
    marrow = MARROW + 0.12 * noise(3)

    def draw_bone(depth: np.ndarray, thickness: np.ndarray | float) -> None:
        """Dark cortex of 2 mm with marrow in its middle; `depth` runs from 0 to `thickness` through the bone, mm."""
        bone = (depth > 0) & (depth < thickness) & body
        head[bone] = CORTEX
        core = bone & (np.abs(depth - thickness / 2) < thickness / 2 - 2)
        head[core] = marrow[core]

    foramen = (x < 15) & (np.abs(y + 46) < 14) & (z < -60)
    draw_bone(np.where(foramen, 0, far - 3), 6 + 1.2 * noise(14))
    below = z < -70
    discs = np.broadcast_to(np.sin(2 * np.pi * z / 17) > 0.85, shape)
    draw_bone(np.where(below & ~discs, 12 - np.hypot(x, spine), 0), 24)
    draw_bone(np.where(below, 16 - np.hypot(x, spine + 18), 0), 3)  # arches around the canal
    head[(np.hypot(x, spine + 18) < 10) & below] = CSF
    head[(np.hypot(x, (spine + 18) * 1.3) < 5.5) & below] = 0.85  # spinal cord
    arch = 44 * np.hypot(x / 44, (y - 30) / 52)  # mm from the middle of the mouth, along x
    draw_bone(np.where((y > 18) & (np.abs(z + 114) < 11), arch - 35, 0), 9)  # lower jaw
    draw_bone(np.where((np.abs(y - 10 + (z + 82) / 4) < 10) & (np.abs(z + 84) < 32), x - 41, 0), 5)  # its branches
    draw_bone(np.where((x < 26) & (y > 18) & (y < 82), z + 81, 0), 3)  # palate
    head[(np.abs(arch - 38) < 4.5) & (y > 40) & (np.abs(z + 93) < 9) & body] = TEETH
    draw_bone(np.where((y > 30) & (y < 74) & (z > -66) & (z < -54), x - 53 + (y - 40) / 6, 0), 5)  # cheekbone

    cells = noise(2.2) > 0.7  # walls and mucosa in the sinuses
    for name, centre, radii, brightness in ORGANS:
        organ = (_ball(x, y, z, centre, radii) < 0) & body & (far > 3)
        head[organ] = brightness
        if name in ("mastoid", "maxillary sinus"):
            head[organ & cells] = MUSCLE
    head[~body] = 0
    return TemplateMap(ndimage.gaussian_filter(head, 0.35), LOW, STEP)


class _Noise:
    """Smooth random textures of deviation 1, one after the other; sigma in mm."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng(SEED)
        self.shape = shape

    def __call__(self, sigma: float | tuple[float, ...]) -> np.ndarray:
        field = self.rng.standard_normal(self.shape, np.float32)
        field = ndimage.gaussian_filter(field, np.array(sigma) / STEP, truncate=3)
        return field / field.std()


def _ball(x: np.ndarray, y: np.ndarray, z: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """About the distance to an ellipsoid's surface in mm, negative inside; x is the distance from the midline."""
    axes = zip((x, y, z), centre, radii, strict=True)
    return (np.sqrt(sum(((axis - middle) / radius) ** 2 for axis, middle, radius in axes)) - 1) * min(radii)
