"""Draws where a model looks, what its layers do, and what its patches have in common, as figures and their numbers."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from crate_dist.checkpoint.trained import Trained, find_layer, load_trained
from crate_dist.config import RecipeError
from crate_dist.data.decode import IMAGE_SUFFIXES
from crate_dist.data.splits import open_split
from crate_dist.figures.charts import Line, Panel, charts
from crate_dist.figures.sheet import Sheet
from crate_dist.figures.tables import Cell, attention_grid, coloured, picture_table
from crate_dist.files import write_whole
from crate_dist.models.residuals.layer import Layer
from crate_dist.models.transformer import Transformer
from crate_dist.whitebox.maps import Maps, patch_keys, token_maps
from crate_dist.whitebox.maskcut import Mask, attention_mask, iou, mask_cut
from crate_dist.whitebox.measures import Profile, profile
from crate_dist.whitebox.pca import Scale, picture_components
from crate_dist.whitebox.pictures import Framing, Picture, PictureError, from_paths, from_split, read_mask
from crate_dist.whitebox.pixels import OBJECTS, enlarged, heat, masked
from crate_dist.whitebox.titles import TOGETHER, measure_title

_BATCH = 16
_SQUARE_ALONE = 'mixer = "cbsa", as published, takes square images alone; "cbsa_aligned" takes others'
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def draw(options: argparse.Namespace, sheet: Sheet) -> tuple[str, list[Path]]:
    """Draws one figure of a model, as the command line says. Returns what it is of, and the files written.

    Raises UserError: the model, the pictures or what is asked of them cannot be.
    """
    trained = load_trained(options.model, options.heads, options.weights)
    layers = (cast(Layer, layer) for layer in trained.model.layers)
    cut = any(layer.mixer.square_alone for layer in layers)
    pictures = _pictures(options, trained, cut)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device, torch.float32).eval()
    sheet.out.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    if cut and options.figure != "layers":
        missing = [f"of each the square in its middle: {_SQUARE_ALONE}"]
    if options.figure == "layers":
        missing, written = draw_layers(model, pictures, sheet)
    else:
        layer = find_layer(options.layer, model.config.depth) - 1
        if options.figure == "attention":
            written = draw_attention(model, pictures, layer, sheet)
        elif options.figure == "pca":
            written = draw_pca(model, pictures, layer, options.threshold, options.invert, options.scale, sheet)
        else:
            truths = _read_truths(options.masks, pictures, cut) if options.masks else {}
            written = draw_masks(model, pictures, layer, truths, options.mass, options.tau, options.objects, sheet)
    return "; ".join([f"{trained.name}, {len(pictures)} pictures", *missing]), written


def draw_attention(model: Transformer, pictures: Sequence[Picture], layer: int, sheet: Sheet) -> list[Path]:
    """Draws class-token attention of all heads over each picture in one layer (figure 4 of arXiv 2306.01129), its mean
    over the heads in every layer, and for each picture the grid of all layers and heads.

    A mixer without attention shows its membership instead, and a head of the model that looks itself its blocks.
    layer: counted from 0
    """
    found = [_maps(model, picture) for picture in tqdm(pictures, unit="image", disable=None)]
    maps, first = [_numbers(each.layers[:, 0]) for each in found], found[0]
    heads, bar, what = range(maps[0].shape[1]), f"{first.kind} / max", first.what[0].upper() + first.what[1:]
    rows = list(zip(pictures, maps, strict=True))
    by_head = [[Cell(p.original), *(Cell(heat(m[layer, head])) for head in heads)] for p, m in rows]
    over_heads = [_numbers(each.over_heads(each.layers[:, 0])) for each in found]
    by_layer = [[Cell(p.original), *map(Cell, map(heat, m))] for p, m in zip(pictures, over_heads, strict=True)]
    columns = ["input", *(f"head {h + 1}" for h in heads)]
    title = sheet.heading(f"{what} in layer {layer + 1}, by head")
    written = sheet.save_pages(
        picture_table(sheet, by_head, columns, bar=bar, title=title), f"{first.kind}-layer-{layer + 1:02d}"
    )
    columns = ["input", *(f"layer {n + 1}" for n in range(len(maps[0])))]
    title = sheet.heading(f"{what}, {first.over_heads_name}, by layer")
    written += sheet.save_pages(picture_table(sheet, by_layer, columns, bar=bar, title=title), f"{first.kind}-layers")
    for picture, each in rows:
        _, _, name = picture.name.partition("-")
        title = sheet.heading(f"{what} on {name}")
        written += sheet.save_pages(
            attention_grid(sheet, picture.original, each, title, bar), f"{first.kind}-{picture.name}"
        )
    numbers = {picture.name: each for picture, each in rows}
    if first.head is not None:
        blocks = [_numbers(each.head[:, 0]) for each in found if each.head is not None]
        title = sheet.heading("Attention of the class token in the last block of the head, by head")
        cells = [[Cell(p.original), *map(Cell, map(heat, m[-1]))] for p, m in zip(pictures, blocks, strict=True)]
        columns = ["input", *(f"head {h + 1}" for h in range(len(blocks[0][-1])))]
        pages = picture_table(sheet, cells, columns, bar="attention / max", title=title)
        written += sheet.save_pages(pages, "attention-head")
        numbers |= {f"{picture.name}/head": each for picture, each in zip(pictures, blocks, strict=True)}
    return [*written, sheet.save_numbers(numbers, "attention")]


def draw_layers(model: Transformer, pictures: Sequence[Picture], sheet: Sheet) -> tuple[list[str], list[Path]]:
    """Draws coding rate after the mixer's projection and non-zeros of the codes (figure 3 of arXiv 2306.01129), beside
    the rate of the tokens themselves, and on pages of their own all other measures that the model has.

    Returns what it does not have, in sentences, and the files.
    """
    tensors = [picture.tensor for picture in pictures]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise PictureError("the profile over the layers is that of pictures of one size, and these tensors have others")
    seen = profile(model, _batches(tensors, next(model.parameters()).device))
    numbers = {name: np.array(values) for name, values in seen.means().items()}
    numbers |= {f"{name}_std": seen.std(name).numpy() for name in seen.values}
    numbers |= {f"{name}_of_images": values.numpy() for name, values in seen.values.items() if values.ndim > 1}
    panels = [_panel("coding rate [nats]", [_line(seen, *each) for each in _rates(seen)])]
    if "zeros" in seen:
        panels.append(_panel(f"non-zeros after {seen.tokenwise} [%]", [_line(seen, "zeros", _of(seen, "zeros"), 1)]))
    written = sheet.save(charts(sheet, panels, sheet.heading("Compression and sparsity, layer by layer")), "layers")
    panels = _other_panels(seen)
    title = sheet.heading("All other measures, layer by layer")
    pages = [charts(sheet, panels[n : n + _A_PAGE], title) for n in range(0, len(panels), _A_PAGE)]
    written += sheet.save_pages(pages, "layers-measures") if pages else []
    return seen.what_is_missing(), [*written, sheet.save_numbers(numbers, "layers")]


_A_PAGE, _LABEL = 6, 34


def _rates(seen: Profile) -> list[tuple[str, str, int]]:
    """Returns the coding rates that a model has, what each is of, and their styles."""
    rates = [("coding_rate", f"in the subspaces of {seen.mixer}", 0), ("token_coding_rate", "of the tokens", 2)]
    return [rate for rate in rates if rate[0] in seen]


def _other_panels(seen: Profile) -> list[Panel]:
    """Returns a panel for each measure that is in no figure of the papers, or one for several of one unit."""
    panels, shared = list[Panel](), {names: title for title, names in TOGETHER.items()}
    left = [name for name in seen.values if name not in ("coding_rate", "token_coding_rate", "zeros")]
    while left:
        group = next((names for names in shared if left[0] in names), (left[0],))
        names = [name for name in group if name in left]
        left = [name for name in left if name not in names]
        titles = [measure_title(name, seen.mixer, seen.tokenwise) for name in names]
        labels = titles if len(names) > 1 else [_of(seen, names[0])]
        lines = [_line(seen, name, label, style) for style, (name, label) in enumerate(zip(names, labels, strict=True))]
        panels.append(_panel(shared[group] if len(names) > 1 else titles[0], lines))
    return panels


def _panel(title: str, lines: Sequence[Line]) -> Panel:
    return Panel(
        "layer", textwrap.fill(title, _LABEL), lines, band_label="± 1 standard deviation", each_label="each head"
    )


def _of(seen: Profile, name: str) -> str:
    return f"mean of {seen[name].shape[1]} images" if seen[name].ndim > 1 else "of each layer"


def _line(seen: Profile, name: str, label: str, style: int) -> Line:
    """Draws one measure over the layers, with its spread; where heads have their own, each of them as a thin line."""
    values, mean, std = seen[name], seen.mean(name).numpy(), seen.std(name).numpy()
    if name == "zeros":
        mean, std = 100 - 100 * mean, 100 * std
    layers = np.arange(1.0, len(mean) + 1)
    heads = values.mean(dim=1).T.numpy() if values.ndim > 2 else ()
    return Line(label, layers, mean, std if values.ndim > 1 else None, [(layers, head) for head in heads], style)


def draw_pca(
    model: Transformer,
    pictures: Sequence[Picture],
    layer: int,
    threshold: float,
    invert: bool,
    scale: Scale,
    sheet: Sheet,
) -> list[Path]:
    """Draws principal components of the patches of all pictures together; see whitebox.pca."""
    features = [_keys(model, picture, layer) for picture in pictures]
    found = picture_components(features, threshold, invert, scale)
    cells: list[list[Cell]] = []
    for picture, one in zip(pictures, found, strict=True):
        colours = np.where(one.foreground[..., None], 255 * one.colours, 255).round().astype(np.uint8)
        foreground = Cell(masked(picture.original, [one.foreground]), [one.foreground])
        cells.append([Cell(picture.original), Cell(coloured(one.first)), foreground, Cell(colours)])
    key = [
        (colour, f"component {number}, {100 * share:.0f} % of the variance")
        for number, (colour, share) in enumerate(zip(_PRIMARIES, found[0].shares, strict=True), start=1)
    ]
    pages = picture_table(
        sheet,
        cells,
        ["input", "first component", "foreground", "components 1 to 3"],
        bar="first component",
        key=key,
        title=sheet.heading(f"Principal components of the patches in layer {layer + 1}"),
    )
    numbers = {
        f"{picture.name}/{name}": getattr(one, name)
        for picture, one in zip(pictures, found, strict=True)
        for name in ("first", "foreground", "colours")
    }
    return [*sheet.save_pages(pages, "pca"), sheet.save_numbers(numbers, "pca")]


def draw_masks(
    model: Transformer,
    pictures: Sequence[Picture],
    layer: int,
    truths: Mapping[str, Mask],
    mass: float,
    tau: float,
    objects: int,
    sheet: Sheet,
) -> list[Path]:
    """Draws foreground by attention and by normalised cut (see whitebox.maskcut), and its overlap with the truth."""
    cells: list[list[Cell]] = []
    notes: list[list[str]] = []
    overlaps: dict[str, dict[str, float]] = {}
    numbers: dict[str, NDArray[Any]] = {}
    for picture in tqdm(pictures, unit="image", disable=None):
        maps = _numbers(_maps(model, picture).looks(layer)[0])
        by_head = [attention_mask(head, mass) for head in maps]
        looked = attention_mask(maps.mean(axis=0), mass)
        found = mask_cut(_keys(model, picture, layer), tau, objects)
        shown = [[looked], found, *([[truths[picture.name]]] if truths else [])]
        cells.append([Cell(picture.original), Cell(heat(maps.mean(axis=0)))])
        cells[-1] += [Cell(masked(picture.original, each), each) for each in shown]
        if truths:
            overlap = overlaps[picture.name] = _overlaps(truths[picture.name], looked, by_head, found)
            notes.append(["", "", f"IoU {overlap['attention']:.2f}", f"IoU {overlap['cut']:.2f}", ""])
        numbers |= {
            f"{picture.name}/attention": looked,
            f"{picture.name}/attention_of_heads": np.array(by_head),
            f"{picture.name}/cut": np.array(found).reshape(-1, *looked.shape),
        }
    columns = ["input", "attention", f"{100 * mass:.0f} % of the attention", "normalised cut"]
    columns += ["truth"] if truths else []
    most = max(len(numbers[f"{picture.name}/cut"]) for picture in pictures)
    key = [(OBJECTS[n], f"{_ORDINALS[n]} object") for n in range(min(most, len(OBJECTS)) if most > 1 else 0)]
    title = sheet.heading(f"Foreground without labels, layer {layer + 1}")
    pages = picture_table(sheet, cells, columns, notes=notes, bar="attention / max", key=key, title=title)
    written = [*sheet.save_pages(pages, "mask"), sheet.save_numbers(numbers, "mask")]
    if truths:
        mean = {name: float(np.mean([one[name] for one in overlaps.values()])) for name in _OVERLAPS}
        path = sheet.out / "mask.json"
        write_whole(path, json.dumps({"mean_iou": mean, "iou": overlaps}, indent=1) + "\n")
        written.append(path)
    return written


_PRIMARIES = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
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


def _maps(model: Transformer, picture: Picture) -> Maps:
    return token_maps(model, picture.tensor[None].to(next(model.parameters()).device))


def _keys(model: Transformer, picture: Picture, layer: int) -> NDArray[np.floating]:
    return _numbers(patch_keys(model, picture.tensor[None].to(next(model.parameters()).device), layer)[0])


def _numbers(tensor: Tensor) -> NDArray[np.floating]:
    values: NDArray[np.floating] = tensor.cpu().numpy()
    return values


def _batches(tensors: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    for first in tqdm(range(0, len(tensors), _BATCH), unit="batch", disable=None):
        yield torch.stack(list(tensors[first : first + _BATCH])).to(device)


def _read_truths(folder: Path, pictures: Sequence[Picture], cut: bool) -> dict[str, Mask]:
    """Reads the mask of each picture: the image file of the same name, without its suffix, in `folder`.

    cut: whether the pictures are the squares in the middle of theirs, and so the masks
    """
    truths = {}
    masks = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    for picture in pictures:
        stem = picture.name.partition("-")[2]
        files = [path for path in masks if path.stem == stem]
        if not files:
            raise PictureError(f"no mask for {stem} in {folder}: expected {stem}.png")
        if len(files) > 1:
            raise PictureError(f"several masks for {stem} in {folder}: {', '.join(path.name for path in files)}")
        truths[picture.name] = read_mask(files[0], picture.pixels.shape[:2], cut)
    return truths


def _pictures(options: argparse.Namespace, trained: Trained, cut: bool) -> list[Picture]:
    config, square = trained.model.config, options.figure == "layers"
    framing = Framing(options.size or config.image_size, config.patch_size, square, trained.images, cut)
    count = options.count or (64 if options.figure == "layers" else 4)
    if options.images:
        pictures = from_paths(options.images, framing, count)
    else:
        try:
            index = open_split(options.data, options.split, trained.data)
        except RecipeError as error:
            raise PictureError(f"no pictures: give --images PATH, or else the data: {error}") from error
        pictures = from_split(index, framing, count)
    if cut and any(picture.tensor.shape[1] != picture.tensor.shape[2] for picture in pictures):  # tensors, as they are
        raise PictureError(f"these tensors are not square: {_SQUARE_ALONE}")
    return [replace(picture, name=f"{n:02d}-{picture.name}") for n, picture in enumerate(pictures, start=1)]
