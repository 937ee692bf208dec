"""Peers beside the model: found by name, brought to the same grid and unit, compared on the same scans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_VAE, Job, make_weights, write_scan
from in_process import parsed
from monai.data import MetaTensor

from scripts.metrics import PeerFolder, PeerWeights, read_peers
from scripts.networks import AutocastInferer, BrainVAE
from scripts.run import InputError
from scripts.transforms import write_nifti

INFERER = AutocastInferer(False, "cpu")
MODEL = BrainVAE(**TINY_VAE)


def model_space(path: Path) -> MetaTensor:
    """The scan as the model sees it."""
    return parsed("evaluate").get_parsed_content("preprocessing")({"image": str(path)})["image"]


def test_a_folder_of_the_scans_themselves_is_exact(tmp_path: Path) -> None:
    """In world space and the scan's own unit, whatever the axes: what comes back is the volume that the model sees."""
    image = model_space(write_scan(tmp_path / "scan" / "sub-01.nii.gz"))
    source = nib.load(tmp_path / "scan" / "sub-01.nii.gz")
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
    (tmp_path / "peer").mkdir()
    path = tmp_path / "peer" / "sub-01_recon.nii.gz"
    write_nifti(np.asarray(turned.dataobj), turned, path)
    peer = PeerFolder("peer", tmp_path / "peer")
    torch.testing.assert_close(peer("sub-01", image), image.as_tensor(), atol=1e-5, rtol=0)
    path.write_bytes(b"no nifti")
    with pytest.raises(InputError, match="sub-01_recon.nii.gz"):
        peer("sub-01", image)


def test_weights_reconstruct_as_their_network(tmp_path: Path) -> None:
    """The posterior mean decoded by the other weights."""
    other = BrainVAE(**TINY_VAE).eval()
    other.load_state_dict(torch.load(make_weights(tmp_path / "other.pt", 1)))
    (peer,) = read_peers([str(tmp_path / "other.pt")], MODEL, INFERER)
    assert isinstance(peer, PeerWeights) and peer.name == "other"
    image = model_space(write_scan(tmp_path / "sub-01.nii.gz"))
    with torch.no_grad():
        wanted = other.decode(other.encode(image.as_tensor()[None])[0])[0]
    torch.testing.assert_close(peer("sub-01", image), wanted)


def test_file_of_a_scan(tmp_path: Path) -> None:
    """Found before the run by the scan's name; none, or several, are an error with the remedy."""
    names = ["sub-01_recon.nii", "sub-02.nii", "sub-01_model_space_recon.nii", "sub-03_a.nii", "sub-03_b.nii"]
    for number, name in enumerate([*names, "sub-020.nii"]):
        nib.save(nib.Nifti1Image(np.full((32, 36, 32), number + 1, np.float32), np.eye(4)), tmp_path / name)
    peer = PeerFolder("peer", tmp_path)
    for name in ("sub-03", "sub-04"):
        with pytest.raises(InputError, match=rf"{name}; one file {name}_recon\.nii\.gz a scan is needed"):
            peer.check(["sub-01", "sub-02", name])
    image = MetaTensor(torch.zeros(1, 32, 36, 32), meta={"intensity_factor": 2.0})
    assert (peer("sub-01", image) == 0.5).all() and (peer("sub-02", image) == 1.0).all()  # 1 and 2 in the scan's unit


def test_names_of_peers(tmp_path: Path) -> None:
    """A model.pt is named after its folder, everything else after itself, or as the dict says; no name stands twice."""
    for folder in ("run_2", "a/out", "b/out"):
        (tmp_path / folder).mkdir(parents=True)
    out, same = (str(tmp_path / folder / "out") for folder in "ab")
    weights = make_weights(tmp_path / "run_2" / "model.pt", 1)
    assert [peer.name for peer in read_peers([str(weights), out], MODEL, INFERER)] == ["run_2", "out"]
    assert [peer.name for peer in read_peers({"early": str(weights)}, MODEL, INFERER)] == ["early"]
    for peers, message in ((["x.pt"], "x.pt"), ([out, same], "'out', like another"), ({"dct": out}, "named 'dct'")):
        with pytest.raises(InputError, match=message):
            read_peers(peers, MODEL, INFERER)


def test_evaluation_puts_peers_beside_the_model(
    start_job: Callable[..., Job], weights: Path, bids: Path, reconstructed: Job, tmp_path: Path
) -> None:
    """Other weights and what inference wrote, by the config: the model's own folder is as good as the model."""
    peers = {"other": str(make_weights(tmp_path / "other.pt", 1)), "recons": str(reconstructed.folder)}
    job = start_job(
        "evaluate", "--dataset_dir", str(bids), "--split", "val", "--weights", str(weights), "--peers", str(peers),
        "--baselines", "[]",
    )  # fmt: skip
    table = pd.read_csv(job.folder / "metrics.csv").set_index(["system", "name"])
    assert list(table.index.unique("system")) == ["model", "other", "recons", "identity"]
    own, again = table.loc["model", "psnr_brain"], table.loc["recons", "psnr_brain"]
    assert abs(own - again).max() < 0.5, "only the way through the scan's grid lies between them"
    paired = pd.read_csv(job.folder / "paired.csv")
    assert set(paired["system"]) == {"other", "recons"} and (paired["n"] == 2).all()
    page = (job.folder / "report.html").read_text(encoding="utf-8")
    assert "Systems side by side" in page and str(tmp_path) not in page
