"""Peers beside the model: found by name, brought to the same grid and unit, compared on the same scans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_JOB, TINY_VAE, write_scan
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
from scipy import stats

from scripts.metrics import PeerFolder, PeerWeights, paired_differences, read_peers
from scripts.networks import AutocastInferer, BrainVAE
from scripts.run import InputError
from scripts.transforms import ScaleByPercentiled, ToModelSpaced, write_nifti

INFERER = AutocastInferer(False, "cpu")
SIZE = (32, 36, 32)
# files in a peer's folder, what is found for the scan "sub-01"
FOLDERS: dict[str, tuple[list[str], str | None]] = {
    "exact name before another": (["sub-01_recon.nii.gz", "sub-01_model_space_recon.nii.gz"], "sub-01_recon.nii.gz"),
    "any ending": (["sub-01_decoded.nii"], "sub-01_decoded.nii"),
    "the plain name": (["sub-01.nii.gz", "sub-010.nii.gz"], "sub-01.nii.gz"),
    "in a subfolder": (["sub-01/anat/sub-01_rec.nii.gz"], "sub-01_rec.nii.gz"),
    "two files": (["sub-01_a.nii.gz", "sub-01_b.nii.gz"], None),
    "another scan's": (["sub-011_recon.nii.gz"], None),
    "nothing": ([], None),
}


def model_space(path: Path) -> MetaTensor:
    transform = Compose(
        [
            LoadImaged(
                "image", reader="NibabelReader", image_only=True, ensure_channel_first=True, dtype=torch.float32
            ),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(4.0, 4.0, 4.0), mode="bilinear", padding_mode="border"),
            ToModelSpaced("image", spatial_size=SIZE),
            ScaleByPercentiled("image", percentile=99.5),
        ]
    )
    return transform({"image": str(path)})["image"]


def figures(values: dict[str, list[float]], subjects: list[str] | None = None) -> pd.DataFrame:
    """Rows of an evaluation with the column psnr."""
    rows: list[dict[str, Any]] = []
    for system, column in values.items():
        for number, value in enumerate(column):
            subject = subjects[number] if subjects else f"s{number}"
            rows.append({"name": f"v{number}", "subject": subject, "system": system, "psnr": value})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("case", FOLDERS)
def test_file_of_a_scan(tmp_path, case):
    files, wanted = FOLDERS[case]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    peer = PeerFolder("peer", tmp_path)
    if wanted is None:
        with pytest.raises(InputError, match=r"sub-01; one file sub-01_recon\.nii\.gz a scan is needed"):
            peer.check(["sub-01"])
    else:
        peer.check(["sub-01"])
        assert peer._file("sub-01").name == wanted


def test_folder_of_the_scans_themselves_is_exact(tmp_path):
    """The scan on its own grid and in its own unit comes back as the volume that the model sees."""
    image = model_space(write_scan(tmp_path / "sub-01.nii.gz"))
    again = PeerFolder("peer", tmp_path)("sub-01", image)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, image.as_tensor(), atol=1e-5, rtol=0)


def test_folder_on_another_grid_lies_in_the_same_place(tmp_path):
    """A peer's axes and voxel size do not matter: the volume is resampled in world space."""
    image = model_space(write_scan(tmp_path / "scan" / "sub-01.nii.gz"))
    source = nib.load(tmp_path / "scan" / "sub-01.nii.gz")
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
    (tmp_path / "peer").mkdir()
    write_nifti(np.asarray(turned.dataobj), turned, tmp_path / "peer" / "sub-01_recon.nii.gz")
    again = PeerFolder("peer", tmp_path / "peer")("sub-01", image)
    torch.testing.assert_close(again, image.as_tensor(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("content", [b"no nifti", None])
def test_unreadable_file_is_named(tmp_path, content):
    image = model_space(write_scan(tmp_path / "sub-01.nii.gz"))
    path = tmp_path / "peer" / "sub-01_recon.nii.gz"
    path.parent.mkdir()
    if content:
        path.write_bytes(content)
    else:
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), path)
    with pytest.raises(InputError, match="sub-01_recon.nii.gz"):
        PeerFolder("peer", path.parent)("sub-01", image)


def test_weights_reconstruct_as_their_network(tmp_path):
    torch.manual_seed(0)
    other, model = BrainVAE(**TINY_VAE).eval(), BrainVAE(**TINY_VAE).eval()
    torch.save(other.state_dict(), tmp_path / "other.pt")
    (peer,) = read_peers([str(tmp_path / "other.pt")], model, INFERER)
    assert isinstance(peer, PeerWeights) and peer.name == "other"
    image = model_space(write_scan(tmp_path / "sub-01.nii.gz"))
    with torch.no_grad():
        wanted = other.decode(other.encode(image.as_tensor()[None])[0])[0]
    torch.testing.assert_close(peer("sub-01", image), wanted)
    assert not torch.equal(next(model.parameters()), next(other.parameters())), "the model's own weights stay"


def test_names_of_peers(tmp_path):
    """A model.pt is named after its folder, everything else after itself, or as the dict says."""
    network = BrainVAE(**TINY_VAE)
    (tmp_path / "run_2").mkdir()
    (tmp_path / "outputs").mkdir()
    torch.save(network.state_dict(), tmp_path / "run_2" / "model.pt")
    paths = [str(tmp_path / "run_2" / "model.pt"), str(tmp_path / "outputs")]
    assert [peer.name for peer in read_peers(paths, network, INFERER)] == ["run_2", "outputs"]
    assert [peer.name for peer in read_peers({"early": paths[0]}, network, INFERER)] == ["early"]
    assert [peer.name for peer in read_peers(paths[1], network, INFERER)] == ["outputs"]


@pytest.mark.parametrize("name", ["model", "identity", "dct"])
def test_names_of_systems_are_taken(tmp_path, name):
    (tmp_path / name).mkdir()
    for peers in ([str(tmp_path / name)], {name: str(tmp_path / name)}):
        with pytest.raises(InputError, match=f"named '{name}'"):
            read_peers(peers, BrainVAE(**TINY_VAE), INFERER)


def test_two_peers_of_one_name_are_refused(tmp_path):
    for folder in ("a/out", "b/out"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InputError, match="named 'out', like another"):
        read_peers([str(tmp_path / "a/out"), str(tmp_path / "b/out")], BrainVAE(**TINY_VAE), INFERER)


def test_missing_peer_is_named(tmp_path):
    with pytest.raises(InputError, match="none.pt"):
        read_peers([str(tmp_path / "none.pt")], BrainVAE(**TINY_VAE), INFERER)


def test_paired_test_is_students():
    rng = np.random.default_rng(0)
    model = rng.normal(25, 2, 10)
    other = model + rng.normal(0.5, 0.3, 10)
    row = paired_differences(figures({"model": list(model), "other": list(other)}), ["psnr"]).iloc[0]
    test = stats.ttest_rel(other, model)
    assert (row["system"], row["figure"], row["n"]) == ("other", "psnr", 10)
    assert row["difference"] == pytest.approx(np.mean(other - model))
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert row["p"] == pytest.approx(test.pvalue)
    assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(other, model).pvalue)


def test_sessions_of_a_subject_count_once():
    """Twenty sessions of one subject are one witness, not twenty."""
    subjects = ["a", "b", *["c"] * 20]
    model, other = [20.0] * 22, [21.0, 22.0, *[26.0, 22.0] * 10]
    row = paired_differences(figures({"model": model, "other": other}, subjects), ["psnr"]).iloc[0]
    assert row["n"] == 3 and row["difference"] == pytest.approx((1 + 2 + 4) / 3)


@pytest.mark.parametrize("other", [[np.inf, 21.0, 22.0], [np.nan, 21.0, 22.0]])
def test_undefined_figures_make_the_test_undefined(other):
    row = paired_differences(figures({"model": [20.0, 20.5, 21.0], "other": other}), ["psnr"]).iloc[0]
    assert np.isnan([row["difference"], row["low"], row["p"], row["p_wilcoxon"]]).all()


def test_one_subject_gives_no_test():
    row = paired_differences(figures({"model": [20.0], "other": [21.0]}), ["psnr"]).iloc[0]
    assert row["difference"] == 1 and np.isnan([row["low"], row["high"], row["p"]]).all()


def test_equal_differences_give_no_division_by_zero(recwarn):
    row = paired_differences(figures({"model": [20.0, 21.0], "other": [21.0, 22.0]}), ["psnr"]).iloc[0]
    assert (row["low"], row["high"]) == (1, 1) and not recwarn.list


def test_evaluation_puts_peers_beside_the_model(run_bundle, weights, bids, tmp_path):
    """Other weights and what inference wrote, by the config: the model's own folder is as good as the model."""
    other = tmp_path / "other.pt"
    torch.manual_seed(1)
    torch.save(BrainVAE(**TINY_VAE).state_dict(), other)
    job = ["--dataset_dir", str(bids), "--split", "val", "--weights", str(weights), *TINY_JOB]
    recons, out = tmp_path / "recons", tmp_path / "out"
    run_bundle("--config_file", "configs/inference.json", *job, "--output_dir", str(recons))
    peers = ["--peers", str({"other": str(other), "recons": str(recons)}), "--baselines", "[]"]
    done = run_bundle("--config_file", "configs/evaluate.json", *job, "--output_dir", str(out), *peers)
    table = pd.read_csv(out / "metrics.csv").set_index(["system", "name"])
    assert list(table.index.unique("system")) == ["model", "other", "recons", "identity"]
    own, again = table.loc["model", "psnr_brain"], table.loc["recons", "psnr_brain"]
    assert abs(own - again).max() < 0.5, "only the way through the scan's grid lies between them"
    assert "paired with 'model'" in done.stdout
    paired = pd.read_csv(out / "paired.csv")
    assert set(paired["system"]) == {"other", "recons"} and (paired["n"] == 2).all()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Systems side by side" in page and str(tmp_path) not in page
