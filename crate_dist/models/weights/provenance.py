"""Which program wrote the weights of others, as what stands beside them tells it, and what that decides.

What no tensor shows is how images are prepared, and in ViT which head reads the patches. Where the file does not tell
either, one is taken, and `notes` say which, why, and what would say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crate_dist.models.weights.families import vit
from crate_dist.models.weights.families.family import Family
from crate_dist.models.weights.opening import options_of

_OF_TIMM = (
    "a ViT of timm's does not say how its images are prepared: taken as its DeiT (bicubic, eval_crop 0.9, ImageNet's "
    "mean and std); its augreg ViTs have a mean and std of 0.5, and convert --set images.mean=0.5,0.5,0.5 "
    "--set images.std=0.5,0.5,0.5 would say so"
)
_READ_TWICE = (
    "a ViT with fc_norm is CRATE's, whose code applies that norm twice, or one of timm's with global_pool='avg', which "
    "applies it once, and nothing here tells which: CRATE's taken; convert --set model.head=mean_patches would say "
    "timm's"
)


@dataclass(frozen=True)
class Provenance:
    """What is known of the origin of a file of others.

    fine_tuned: by a family's fine-tuning code; images: how its code prepares images to be evaluated, in keys of
    [images], where that is not our default; told: fields of a ModelConfig; notes: what was taken, and why
    """

    fine_tuned: bool
    images: Mapping[str, Any]
    told: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def of_tensors(family: Family, published: bool) -> Provenance:
    """Returns what weights alone tell; published: under the names of a family's published code."""
    if not published:
        return Provenance(False, {})
    note = _OF_TIMM if family is vit.TIMM else _READ_TWICE if family is vit.FAMILY else ""
    return Provenance(False, family.evaluated, {}, (note,) if note else ())


def of_checkpoint(family: Family, key: str, content: Mapping[str, Any]) -> Provenance:
    """Returns what a checkpoint `content` of somebody's training tells, whose weights stand under `key`."""
    if family is vit.TIMM:
        return of_tensors(family, True)
    if family is vit.FAMILY and "version" in content:  # which timm's training writes, and CRATE's does not
        return Provenance(False, vit.TIMM.evaluated, {"head": "mean_patches"}, (_OF_TIMM,))
    if family.key == "model":
        return _of_tost(family, key, content)
    fine_tuned = family.key is not None and key in ("model", "net")  # and not under what anybody's training writes
    sure = family is not vit.FAMILY or (_is_of_finetune(key, content) if fine_tuned else "best_acc1" in content)
    notes = () if sure else (_READ_TWICE,)
    return Provenance(fine_tuned, family.fine_tuned if fine_tuned else family.evaluated, {}, notes)


def _is_of_finetune(key: str, content: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint has what CRATE's and ToST's finetune.py save, or an older one, and no other code.

    {"model", "optimizer", "scaler"}, without epoch and options, or {"net", "acc", "epoch"}, which is read on --resume
    """
    trained = content.keys() & {"args", "epoch", "lr_scheduler"}
    return ("scaler" in content and not trained) or (key == "net" and "acc" in content)


def _of_tost(family: Family, key: str, content: Mapping[str, Any]) -> Provenance:
    """Tells ToST's two codes apart, which both save under "model"."""
    if options_of(content).get("full_crop") is True:
        return Provenance(False, {**family.evaluated, "eval_crop": 1.0})
    if _is_of_finetune(key, content):
        why = '"acc" beside "net"' if key == "net" else 'a "scaler" and neither "epoch" nor "args" in it'
        note = f"taken as fine-tuned, by {why}: evaluated as ToST's finetune.py does, both sides resized, bilinear"
        return Provenance(True, family.fine_tuned, {}, (note,))
    if key in (family.key, "model_ema") and content.keys() & {"args", "epoch", "lr_scheduler"}:
        return Provenance(False, family.evaluated)
    note = (
        "nothing in it says whether it was fine-tuned: evaluated as ToST's main.py does, short side resized, bicubic, "
        "and the centre cut out; convert --set images.eval_fit=stretch --set images.resize_filter=bilinear would say "
        "that finetune.py wrote it"
    )
    return Provenance(False, family.evaluated, {}, (note,))
