"""Draws the figures of CRATE's papers, of any trained model and any pictures.

    python -m crate_dist.figures attention runs/crate_base --images photos --out figures
    python -m crate_dist.figures layers    runs/crate_base --data /data/imagenet-shards --out figures
    python -m crate_dist.figures pca       model-best.pt --images a.jpg b.jpg c.jpg --out figures
    python -m crate_dist.figures mask      model-best.pt --images photos --masks truth --out figures

Each writes its pictures as PNG, at the size at which they stand on a page, and the numbers in them as .npz beside.
Pictures are read whole, with the short side of the size that the model was trained at or of --size, on a grid of
patches of their own proportions, for which the positions are interpolated; `layers` reads the centre, as evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_dist.arguments import Parser, positive
from crate_dist.checkpoint.trained import Trained, find_layer, load_trained
from crate_dist.config import DATA_VARIABLE, RecipeError
from crate_dist.data.decode import IMAGE_SUFFIXES, Pixels
from crate_dist.data.splits import open_split
from crate_dist.errors import UserError
from crate_dist.files import written_whole
from crate_dist.locations import location
from crate_dist.models.crate import CRATE
from crate_dist.whitebox import plots
from crate_dist.whitebox.maskcut import Mask, attention_mask, iou, mask_cut
from crate_dist.whitebox.measures import class_attention_maps, patch_projections, profile
from crate_dist.whitebox.pca import picture_components
from crate_dist.whitebox.pictures import Framing, Picture, PictureError, from_paths, from_split, read_mask
from crate_dist.whitebox.pixels import enlarged, heat, layer_profile, masked

_BATCH = 16


def draw_attention(model: CRATE, pictures: Sequence[Picture], layer: int, out: Path) -> list[Path]:
    """Draws class-token attention of all heads over each picture in one layer (figure 4 of arXiv 2306.01129), its mean
    over the heads in every layer, and for each picture the grid of all layers and heads.

    layer: counted from 0
    """
    maps = [_on(model, class_attention_maps, picture)[:, 0] for picture in pictures]
    heads = range(maps[0].shape[1])
    by_head = [[p.pixels, *(heat(m[layer, h]) for h in heads)] for p, m in zip(pictures, maps, strict=True)]
    by_layer = [[p.pixels, *(heat(m) for m in each.mean(axis=1))] for p, each in zip(pictures, maps, strict=True)]
    written = [
        _draw(
            plots.picture_table(by_head, ["input", *(f"head {h + 1}" for h in heads)], bar=True),
            out / f"attention-layer-{layer + 1:02d}.png",
        ),
        _draw(
            plots.picture_table(by_layer, ["input", *(f"layer {n + 1}" for n in range(len(maps[0])))], bar=True),
            out / "attention-layers.png",
        ),
    ]
    for picture, each in zip(pictures, maps, strict=True):
        written.append(_draw(plots.attention_grid(picture.pixels, each), out / f"attention-{picture.name}.png"))
    return [*written, _numbers(out / "attention.npz", {p.name: m for p, m in zip(pictures, maps, strict=True)})]


def draw_layers(model: CRATE, pictures: Sequence[Picture], out: Path) -> list[Path]:
    """Draws coding rate after MSSA's projection and non-zeros after ISTA (figure 3 of arXiv 2306.01129)."""
    device = next(model.parameters()).device
    tensors = [picture.tensor for picture in pictures]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise PictureError("the profile over the layers is that of pictures of one size, and these tensors have others")
    batches = [torch.stack(tensors[first : first + _BATCH]).to(device) for first in range(0, len(tensors), _BATCH)]
    seen = profile(model, batches)
    numbers = {
        "coding_rate_std": seen.coding_rate_std.numpy(),
        "zeros_std": seen.zeros_std.numpy(),
        **{name: np.array(values) for name, values in seen.means().items()},
        "coding_rate_of_images": seen.coding_rate.numpy(),
        "zeros_of_images": seen.zeros.numpy(),
    }
    path = out / "layers.png"
    with written_whole(path) as file:
        Image.fromarray(layer_profile(seen, width=round(plots.TEXT_WIDTH_IN * plots.DPI))).save(file, "PNG")
    return [path, _numbers(out / "layers.npz", numbers)]


def draw_pca(
    model: CRATE, pictures: Sequence[Picture], layer: int, threshold: float, invert: bool, out: Path
) -> list[Path]:
    """Draws principal components of the patches of all pictures together, scaled in each; see whitebox.pca."""
    features = [_on(model, patch_projections, picture, layer)[0] for picture in pictures]
    found = picture_components(features, threshold, invert)
    cells: list[list[Pixels]] = []
    for picture, one in zip(pictures, found, strict=True):
        colours = np.where(one.foreground[..., None], 255 * one.colours, 255).round().astype(np.uint8)
        cells.append([picture.pixels, heat(one.first), masked(picture.pixels, [one.foreground]), colours])
    figure = plots.picture_table(cells, ["input", "first component", "foreground", "components 1 to 3"])
    numbers = {
        f"{picture.name}/{name}": getattr(one, name)
        for picture, one in zip(pictures, found, strict=True)
        for name in ("first", "foreground", "colours")
    }
    return [_draw(figure, out / "pca.png"), _numbers(out / "pca.npz", numbers)]


def draw_masks(
    model: CRATE,
    pictures: Sequence[Picture],
    layer: int,
    truths: Mapping[str, NDArray[np.bool_]],
    mass: float,
    tau: float,
    objects: int,
    out: Path,
) -> list[Path]:
    """Draws foreground by attention and by normalised cut (see whitebox.maskcut), and its overlap with the truth."""
    cells: list[list[Pixels]] = []
    notes: list[list[str]] = []
    overlaps: dict[str, dict[str, float]] = {}
    numbers: dict[str, NDArray[Any]] = {}
    for picture in pictures:
        maps = _on(model, class_attention_maps, picture)[layer, 0]
        by_head = [attention_mask(head, mass) for head in maps]
        looked = attention_mask(maps.mean(axis=0), mass)
        found = mask_cut(_on(model, patch_projections, picture, layer)[0], tau, objects)
        row = [picture.pixels, heat(maps.mean(axis=0)), masked(picture.pixels, [looked])]
        row.append(masked(picture.pixels, found))
        note = ["", "", "", ""]
        if truths:
            truth = truths[picture.name]
            overlap = _overlaps(truth, looked, by_head, found)
            row.append(masked(picture.pixels, [truth]))
            note = ["", "", f"IoU {overlap['attention']:.2f}", f"IoU {overlap['cut']:.2f}", ""]
            overlaps[picture.name] = overlap
        cells.append(row)
        notes.append(note)
        numbers |= {
            f"{picture.name}/attention": looked,
            f"{picture.name}/attention_of_heads": np.array(by_head),
            f"{picture.name}/cut": np.array(found).reshape(-1, *looked.shape),
        }
    columns = ["input", "attention", f"{mass:.0%} of the attention", "normalised cut", *(["truth"] if truths else [])]
    figure = plots.picture_table(cells, columns, notes=notes if truths else ())
    written = [_draw(figure, out / "mask.png"), _numbers(out / "mask.npz", numbers)]
    if truths:
        mean = {name: float(np.mean([one[name] for one in overlaps.values()])) for name in _OVERLAPS}
        text = json.dumps({"mean_iou": mean, "iou": overlaps}, indent=1)
        (out / "mask.json").write_text(text + "\n", encoding="utf-8")
        written.append(out / "mask.json")
    return written


_OVERLAPS = ("attention", "best_head", "cut", "best_object")


def _overlaps(truth: Mask, looked: Mask, by_head: Sequence[Mask], found: Sequence[Mask]) -> dict[str, float]:
    """Returns IoU with the truth in pixels: of the whole cut, its best object, the attention, and its best head."""
    full = [[enlarged(mask, truth.shape) for mask in masks] for masks in (by_head, found)]
    everything = np.logical_or.reduce(full[1]) if found else np.zeros_like(truth)
    return {
        "attention": iou(enlarged(looked, truth.shape), truth),
        "best_head": max(iou(mask, truth) for mask in full[0]),
        "cut": iou(everything, truth),
        "best_object": max((iou(mask, truth) for mask in full[1]), default=0.0),
    }


def _on(model: CRATE, measure: Callable[..., Tensor], picture: Picture, *rest: int) -> NDArray[np.floating]:
    images: Tensor = picture.tensor[None].to(next(model.parameters()).device)
    values: NDArray[np.floating] = measure(model, images, *rest).cpu().numpy()
    return values


def _draw(figure: Figure, path: Path) -> Path:
    plots.save(figure, path)
    return path


def _numbers(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Path:
    with written_whole(path) as file:
        np.savez_compressed(file, **dict[str, Any](arrays))
    return path


def _read_truths(folder: Path, pictures: Sequence[Picture]) -> dict[str, NDArray[np.bool_]]:
    """Reads the mask of each picture: the image file of the same name, without its suffix, in `folder`."""
    truths = {}
    for picture in pictures:
        stem = picture.name.partition("-")[2]
        files = [path for path in sorted(folder.glob(f"{stem}.*")) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise PictureError(f"no mask for {stem} in {folder}: expected {stem}.png")
        truths[picture.name] = read_mask(files[0], picture.pixels.shape[:2])
    return truths


def _parser() -> Parser:
    parser = Parser(prog="python -m crate_dist.figures", description=__doc__)
    commands = parser.add_subparsers(dest="figure", required=True, metavar="attention | layers | pca | mask")
    common = Parser(add_help=False)
    common.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|WEIGHTS", help="whose figure it is")
    source = common.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="files and folders; .pt: tensors")
    source.add_argument(
        "--data", type=location, metavar="DIR", help=f"or folder or URL of shards [the run's, then ${DATA_VARIABLE}]"
    )
    common.add_argument("--split", default="val", help="folder in it [%(default)s]")
    common.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    common.add_argument("--count", type=positive, metavar="N", help="the first N pictures [layers: 64, others: 4]")
    common.add_argument("--heads", type=positive, metavar="N", help="of the model, where its file does not tell")
    common.add_argument("--size", type=positive, metavar="PIXELS", help="short side [as the model was trained]")
    layered = Parser(add_help=False)
    layered.add_argument("--layer", type=int, metavar="N", help="counted from 1; -1: the last [-1]")
    commands.add_parser("attention", parents=[common, layered], help="where the class token looks")
    commands.add_parser("layers", parents=[common], help="coding rate and sparsity of every layer")
    pca = commands.add_parser("pca", parents=[common, layered], help="patches in the colours of their components")
    pca.add_argument("--threshold", type=float, default=0.5, metavar="T", help="of the first component [%(default)s]")
    pca.add_argument("--invert", action="store_true", help="the foreground is the other side")
    mask = commands.add_parser("mask", parents=[common, layered], help="foreground by attention and by normalised cut")
    mask.add_argument("--mass", type=float, default=0.6, metavar="M", help="share of the attention [%(default)s]")
    mask.add_argument("--tau", type=float, default=0.15, metavar="T", help="cosine that joins patches [%(default)s]")
    mask.add_argument("--objects", type=positive, default=3, metavar="N", help="cut out at most [%(default)s]")
    mask.add_argument("--masks", type=Path, metavar="DIR", help="the truth: images of the same names, not 0 inside")
    return parser


def _pictures(options: argparse.Namespace, trained: Trained) -> list[Picture]:
    config = trained.model.config
    framing = Framing(options.size or config.image_size, config.patch_size, options.figure == "layers", trained.images)
    count = options.count or (64 if options.figure == "layers" else 4)
    if options.images:
        pictures = from_paths(options.images, framing, count)
    else:
        try:
            index = open_split(options.data, options.split, trained.data)
        except RecipeError as error:
            raise PictureError(f"no pictures: give --images PATH, or else the data: {error}") from error
        pictures = from_split(index, framing, count)
    return [Picture(f"{n:02d}-{p.name}", p.pixels, p.tensor) for n, p in enumerate(pictures, start=1)]


def main(argv: list[str] | None = None) -> int:
    """Draws one figure, as the command line says, and names the files written."""
    options = _parser().parse_args(argv)
    try:
        if options.out.exists() and not options.out.is_dir():
            raise PictureError(f"--out {options.out} is a file; give a folder, which is made where there is none")
        trained = load_trained(options.model, options.heads)
        pictures = _pictures(options, trained)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, out = trained.model.to(device, torch.float32).eval(), options.out
        out.mkdir(parents=True, exist_ok=True)
        if options.figure == "layers":
            written = draw_layers(model, pictures, out)
        else:
            layer = find_layer(options.layer, model.config.depth) - 1
            if options.figure == "attention":
                written = draw_attention(model, pictures, layer, out)
            elif options.figure == "pca":
                written = draw_pca(model, pictures, layer, options.threshold, options.invert, out)
            else:
                truths = _read_truths(options.masks, pictures) if options.masks else {}
                written = draw_masks(model, pictures, layer, truths, options.mass, options.tau, options.objects, out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"{trained.name}, {len(pictures)} pictures:", *written, sep="\n  ")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
