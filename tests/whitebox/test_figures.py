"""The figures are drawn by one command from any model and any pictures, and say what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from crate_dist.config import ImageSection, ModelSection
from crate_dist.figures.__main__ import main
from crate_dist.figures.sheet import Sheet
from crate_dist.figures.tables import Cell, edges, picture_table
from crate_dist.models.build import build_model, initialise
from crate_dist.models.config import ModelConfig
from crate_dist.models.weights.names import from_reference
from crate_dist.models.weights.write import export_model
from crate_dist.whitebox.pictures import Framing, PictureError, from_paths, read_mask
from tests.pictures import photo

GOLDEN = Path(__file__).parents[1] / "golden" / "crate_parity.pt"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def golden_files(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The golden model as an export, and its images as the published vis_utils reads them."""
    folder = tmp_path_factory.mktemp("golden")
    config = ModelConfig(**{key: value for key, value in golden["config"].items() if key != "dim_head"})
    export_model(folder / "model.pt", config, from_reference(golden["state_dict"]))
    torch.save({"imgs": golden["images"]}, folder / "images.pt")
    return folder / "model.pt", folder / "images.pt"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wide, a high and a square picture."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate([(90, 60), (50, 75), (64, 64)]):
        Image.fromarray(photo(width, height, seed=number)).save(folder / f"photo{number}.jpg")
    return folder


def model(folder: Path, patch: int) -> Path:
    config = ModelConfig(image_size=32, patch_size=patch, num_classes=4, dim=24, depth=3, heads=2)
    export_model(folder / f"patch{patch}.pt", config, initialise(config, seed=0).state_dict())
    return folder / f"patch{patch}.pt"


def draw(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_layers_has_the_published_numbers(
    golden: dict[str, Any], golden_files: tuple[Path, Path], tmp_path: Path
) -> None:
    weights, images = golden_files
    assert draw("layers", weights, "--images", images, "--out", tmp_path) == 0
    numbers = np.load(tmp_path / "layers.npz")
    means, stds = zip(*golden["coding_rate"], strict=True)
    assert numbers["coding_rate"].tolist() == pytest.approx(means, rel=1e-5)
    assert numbers["coding_rate_std"].tolist() == pytest.approx(stds, rel=1e-3)
    assert numbers["zeros"].tolist() == pytest.approx(golden["sparsity_zero_fraction"], abs=1e-6)
    assert Image.open(tmp_path / "layers.png").width == 1890  # 6.3 inches
    column = ("--count", 1, "--out", tmp_path / "paper", "--dpi", 100, "--width", 3.25)
    assert draw("layers", weights, "--images", images, *column, "--format", "png", "pdf", "svg", "--title", "none") == 0
    png, pdf, svg = (tmp_path / "paper" / f"layers.{kind}" for kind in ("png", "pdf", "svg"))
    assert Image.open(png).width == 325
    assert pdf.read_bytes().startswith(b"%PDF")
    assert not any(other in pdf.read_bytes() for other in (b"/Type3", b"CreationDate"))
    assert "<dc:date>" not in svg.read_text()
    assert "Compression and sparsity" not in svg.read_text()  # letters are drawn, and the text is named beside
    assert (
        draw("layers", weights, "--images", images, *column, "--format", "svg", "--title", "Of the golden model") == 0
    )
    assert "Of the golden model" in svg.read_text()


def test_attention_has_the_published_maps(
    golden: dict[str, Any], golden_files: tuple[Path, Path], tmp_path: Path
) -> None:
    weights, images = golden_files
    assert draw("attention", weights, "--images", images, "--out", tmp_path) == 0
    maps = np.load(tmp_path / "attention.npz")
    assert len(maps.files) == 4
    for number, name in enumerate(sorted(maps.files)):
        expected = golden["attention"][:, number, :, 0, 1:].numpy()
        assert np.allclose(maps[name].reshape(expected.shape), expected, atol=1e-5)
    pngs = {path.name for path in tmp_path.glob("*.png")}
    assert {"attention-layer-03.png", "attention-layers.png", "attention-01-images-000.png"} <= pngs


@pytest.mark.parametrize("patch", [8, 16])
def test_pictures_of_any_shape_are_drawn_at_either_patch(patch: int, photos: Path, tmp_path: Path) -> None:
    weights, out = model(tmp_path, patch), tmp_path / "out"
    for figure, *options in (
        ["attention", "--layer", 1],
        ["pca"],
        ["mask", "--size", 64, "--objects", 2],
        ["layers"],
    ):
        assert draw(figure, weights, "--images", photos, "--out", out, *options) == 0
    assert np.load(out / "attention.npz")["01-photo0"].shape == (3, 2, 32 // patch, 48 // patch)
    assert np.load(out / "attention.npz")["02-photo1"].shape == (3, 2, 48 // patch, 32 // patch)
    assert np.load(out / "pca.npz")["03-photo2/colours"].shape == (32 // patch, 32 // patch, 3)
    assert np.load(out / "mask.npz")["01-photo0/attention"].shape == (64 // patch, 96 // patch)
    assert np.load(out / "layers.npz")["zeros_of_images"].shape == (3, 3)
    for name in ("attention-layer-01", "attention-layers", "attention-02-photo1", "pca", "mask", "layers"):
        with Image.open(out / f"{name}.png") as image:
            assert image.width <= 1890
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert not list(out.glob(".*"))


def test_published_cbt_takes_the_square_in_the_middle_of_a_photo_and_says_so(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = ModelSection(arch="cbt_tiny", image_size=32, patch_size=4, width=16, depth=1, heads=2)
    for mixer, rows, cols in (("cbsa", 8, 8), ("cbsa_aligned", 8, 12)):
        net, weights = build_model(section.model_copy(update={"mixer": mixer}), 3, seed=0), tmp_path / f"{mixer}.pt"
        export_model(weights, net.config, net.state_dict())
        shown = ["--images", photos, "--count", 1, "--dpi", 30, "--out", tmp_path / mixer]
        assert draw("attention", weights, *shown) == 0
        assert ("of each the square in its middle" in capsys.readouterr().out) == (mixer == "cbsa")
        assert np.load(tmp_path / mixer / "attention.npz")["01-photo0"].shape == (1, 2, rows, cols)
    torch.save(torch.rand(1, 3, 32, 48), tmp_path / "wide.pt")
    assert draw("pca", tmp_path / "cbsa.pt", "--images", tmp_path / "wide.pt", "--out", tmp_path / "out") == 1
    assert "cbsa_aligned" in capsys.readouterr().err


def test_a_mask_is_cut_as_its_picture(tmp_path: Path) -> None:
    wide = np.zeros((20, 30), dtype=np.uint8)
    wide[:, 5:15] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    cut = read_mask(tmp_path / "wide.png", (20, 20), cut=True)
    assert np.array_equal(cut, wide[:, 5:25] > 0)


def test_inputs_are_shown_at_their_own_resolution(tmp_path: Path) -> None:
    framing = Framing(32, 8, square=False, prepared=ImageSection())
    for name, (width, height) in {"large": (1200, 1100), "small": (90, 60)}.items():
        Image.fromarray(photo(width, height)).save(tmp_path / f"{name}.png")
    large, small = from_paths([tmp_path], framing, count=2)
    assert large.pixels.shape == (32, 32, 3)
    assert small.pixels.shape == (32, 48, 3)
    assert large.original.shape == (1024, 1117, 3)  # more than a page shows
    assert np.array_equal(small.original, photo(90, 60))


def test_a_mask_has_an_edge_along_the_border_too() -> None:
    mask = np.array([[True, True, False], [True, False, False]])
    lines = {tuple(map(tuple, (line * [3, 2]).round().astype(int).tolist())) for line in edges(mask)}
    border = {((0, 0), (1, 0)), ((1, 0), (2, 0)), ((0, 0), (0, 1)), ((0, 1), (0, 2)), ((0, 2), (1, 2))}
    assert lines == border | {((2, 0), (2, 1)), ((1, 1), (2, 1)), ((1, 1), (1, 2))}
    assert len(edges(np.ones((2, 3), dtype=bool))) == 10


def table(*ratios: float, columns: int = 4) -> list[Figure]:
    cells = [[Cell(np.zeros((round(40 * ratio), 40, 3), np.uint8))] * columns for ratio in ratios]
    return picture_table(Sheet(Path()), cells, [f"head {n}" for n in range(columns)], bar="attention / max", title="A")


def extents(page: Figure) -> list[tuple[float, float, float, float]]:
    """Left, right, lower and upper edges of the pictures, in inches."""
    return [image.get_extent() for image in page.axes[0].images]


@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "expected"), [(24, 17, 1.0, 1), (12, 7, 1.5, 1), (64, 4, 0.67, 4), (3, 2, 8.0, 3)]
)
def test_a_figure_fits_a_page_and_goes_on_on_the_next(rows: int, columns: int, ratio: float, expected: int) -> None:
    pages = table(*[ratio] * rows, columns=columns)
    for page in pages:
        across, down = page.get_size_inches()
        assert across <= 6.3 + 1e-9
        assert down <= 8.9 + 1e-9
        for x0, x1, y0, y1 in extents(page):
            assert 0 <= x0 < x1 <= across
            assert 0 <= y0 < y1 <= down
    assert sum(len(extents(page)) for page in pages) == rows * columns
    assert len(pages) == expected


def test_one_portrait_takes_no_more_of_the_page_than_the_others() -> None:
    (page,) = table(0.67, 1.5, 0.67)
    sizes = [(x1 - x0, y1 - y0) for x0, x1, y0, y1 in extents(page)[::4]]
    assert sizes[1][0] * sizes[1][1] == pytest.approx(sizes[0][0] * sizes[0][1], rel=0.05)
    assert sizes[1][1] / sizes[1][0] == pytest.approx(1.5)


def test_overlap_with_given_masks_is_counted_in_pixels(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = tmp_path / "truth"
    truth.mkdir()
    for number, (width, height) in enumerate([(90, 60), (50, 75), (64, 64)]):
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[: height // 2] = 255
        Image.fromarray(mask).save(truth / f"photo{number}.png")
    arguments = ("mask", model(tmp_path, 8), "--images", photos, "--out", tmp_path, "--mass", 1, "--masks", truth)
    assert draw(*arguments) == 0
    overlaps = json.loads((tmp_path / "mask.json").read_text())
    for picture in overlaps["iou"].values():
        assert picture["attention"] == pytest.approx(0.5, abs=0.02)  # all patches against the upper half
        assert 0 <= picture["best_object"] <= 1
    assert overlaps["mean_iou"]["best_head"] == pytest.approx(0.5, abs=0.02)
    Image.fromarray(mask).save(truth / "photo1.1.png")  # of another picture
    assert draw(*arguments) == 0
    assert json.loads((tmp_path / "mask.json").read_text()) == overlaps
    Image.fromarray(mask).save(truth / "photo1.bmp")
    assert draw(*arguments) == 1
    assert "several masks for photo1" in capsys.readouterr().err
    for name in ("photo1.png", "photo1.bmp"):
        (truth / name).unlink()
    assert draw(*arguments) == 1
    assert "no mask for photo1" in capsys.readouterr().err


def test_pictures_come_from_shards_too(cast_shards: Path, tmp_path: Path) -> None:
    assert draw("pca", model(tmp_path, 8), "--data", cast_shards, "--count", 2, "--out", tmp_path) == 0
    assert {name.partition("/")[0] for name in np.load(tmp_path / "pca.npz").files} == {"01-000000", "02-000001"}


@pytest.mark.parametrize(
    "kind", ["truncated", "text", "missing", "too long", "tensor of another shape", "empty folder"]
)
def test_pictures_that_cannot_be_used_are_named(
    kind: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "broken.jpg"
    if kind == "truncated":
        bad.write_bytes((photos / "photo0.jpg").read_bytes()[:400])
    elif kind == "text":
        bad.write_text("no picture")
    elif kind == "too long":
        Image.fromarray(photo(900, 20)).save(bad)
    elif kind == "tensor of another shape":
        bad = tmp_path / "broken.pt"
        torch.save({"imgs": torch.zeros(2, 3, 30, 32)}, bad)
    elif kind == "empty folder":
        bad = tmp_path / "broken"
        bad.mkdir()
    assert draw("attention", model(tmp_path, 8), "--images", photos / "photo1.jpg", bad, "--out", tmp_path) == (
        0 if kind == "empty folder" else 1
    )
    output = capsys.readouterr()
    assert ("broken" in output.err) == (kind != "empty folder")
    assert "Traceback" not in output.err
    if kind == "empty folder":
        assert draw("attention", model(tmp_path, 8), "--images", bad, "--out", tmp_path) == 1
        assert "no images in" in capsys.readouterr().err


def test_models_that_cannot_be_used_are_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "other.pth.tar")
    for wrong in (tmp_path / "text.pt", tmp_path / "other.pth.tar", tmp_path / "none.pt", photos):
        assert draw("layers", wrong, "--images", photos, "--out", tmp_path) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert wrong.name in error


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("attention", "--layer", 4), "--layer 4: the model has layers 1 to 3, the last also being -1"),
        (("attention", "--layer", 0), "--layer 0: the model has layers 1 to 3"),
        (("attention", "--size", 44), "a side of 44 pixels is no whole number of patches of 8; 40 or 48 would be"),
        (("pca", "--threshold", 1.5), "--threshold lies between 0 and 1, not at 1.5"),
        (("mask", "--mass", 0), "--mass is a share above 0 and up to 1, not 0.0"),
    ],
)
def test_options_that_cannot_be_are_named(
    wrong: tuple[str | float, ...], said: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, *options = wrong
    assert draw(figure, model(tmp_path, 8), "--images", photos, "--out", tmp_path, *options) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_what_a_figure_cannot_be_drawn_of_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, side in enumerate((32, 40)):
        torch.save(torch.zeros(1, 3, side, side), tmp_path / f"{number}.pt")
    tensors = [tmp_path / "0.pt", tmp_path / "1.pt"]
    assert draw("layers", model(tmp_path, 8), "--images", *tensors, "--out", tmp_path) == 1
    assert "pictures of one size" in capsys.readouterr().err
    torch.save(torch.full((1, 3, 32, 32), torch.nan), tmp_path / "nan.pt")
    assert draw("pca", model(tmp_path, 8), "--images", tmp_path / "nan.pt", "--out", tmp_path) == 1
    assert "features that are not finite" in capsys.readouterr().err


def test_a_tensor_file_is_read_as_the_model_does_and_shown_as_it_was(golden_files: tuple[Path, Path]) -> None:
    framing = Framing(32, 8, square=True, prepared=ImageSection(eval_crop=1.0))
    pictures = from_paths([golden_files[1]], framing, count=2)
    stored = torch.load(golden_files[1], weights_only=True)["imgs"]
    assert len(pictures) == 2
    assert torch.equal(pictures[1].tensor, stored[1])
    assert pictures[0].pixels.shape == (32, 32, 3)


def test_masks_of_all_kinds_mean_the_same(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:15, 10:20] = 1
    images = {
        "l": Image.fromarray(mask * 255),
        "one": Image.fromarray(mask.astype(bool)),
        "palette": Image.fromarray(mask).convert("P"),
        "rgba": Image.fromarray(np.dstack([mask * 9, mask * 0, mask * 0, np.full_like(mask, 255)])),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", (20, 30)), mask > 0), name
    with pytest.raises(PictureError, match=r"l\.png is 30 x 20; its picture has other proportions"):
        read_mask(tmp_path / "l.png", (30, 20))
