"""Weights survive every way in and out bit for bit, and a file that is unfit says why."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lion_pytorch import Lion
from torch import Tensor, nn

from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import ModelSection
from crate_dist.models.build import build_model, initialise
from crate_dist.models.config import ModelConfig
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.__main__ import main
from crate_dist.models.weights.files import describe
from crate_dist.models.weights.names import (
    WeightsError,
    check_fit,
    from_reference,
    infer_config,
    to_reference,
)
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference, export_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "crate_reference_checkpoint.pth.tar"
SMALL = ModelConfig(image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return initialise(SMALL, seed=3).state_dict()


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_published_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    original = torch.load(CHECKPOINT, weights_only=True)
    model, meta = load_model(CHECKPOINT, heads=4)
    assert meta == {"epoch": 3, "arch": "CRATE_tiny", "best_acc1": 12.5, "resize_filter": "bilinear"}
    export_model(tmp_path / "ours.pt", model.config, model.state_dict(), meta)
    again, meta = load_model(tmp_path / "ours.pt")  # our export knows its heads
    export_reference(tmp_path / "back.pth.tar", again.config, again.state_dict(), meta)
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    assert (back["epoch"], back["arch"], back["best_acc1"]) == (3, "CRATE_tiny", original["best_acc1"])
    assert_equal(back["state_dict"], original["state_dict"])


def test_what_is_written_has_the_published_names_in_the_published_order() -> None:
    golden = torch.load(GOLDEN / "crate_parity.pt", weights_only=True)
    ours = from_reference(golden["state_dict"])
    assert_equal(to_reference(ours), golden["state_dict"])
    assert infer_config(ours, heads=4) == ModelConfig(
        image_size=32, patch_size=8, num_classes=10, dim=48, depth=3, heads=4
    )


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", ["state_dict", "model", "net", None])
def test_every_layout_of_the_published_code_is_read(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, key: str | None
) -> None:
    theirs = to_reference(state, prefix)
    torch.save({key: theirs, "optimizer": {"state": {}}} if key else theirs, tmp_path / "weights.pt")
    assert_equal(read_weights(tmp_path / "weights.pt").state_dict, state)
    model, meta = load_model(tmp_path / "weights.pt", heads=3)
    assert_equal(dict(model.state_dict()), state)
    assert meta["resize_filter"] == "bilinear"  # as that code does


class Published(nn.Module):
    """Parameters that are called as the published code calls them, and a loss that reaches each."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in to_reference(state).items():
            *folders, last = name.split(".")
            module: nn.Module = self
            for folder in folders:
                if folder not in dict(module.named_children()):
                    module.add_module(folder, nn.Module())
                module = module.get_submodule(folder)
            module.register_parameter(last, nn.Parameter(tensor.clone()))

    def forward(self) -> Tensor:
        return torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()


@pytest.mark.parametrize("optimizer", ["Lion", "AdamW", "SGD"])
def test_the_state_of_optimizers_schedulers_and_scalers_beside_the_weights_does_not_hinder(
    tmp_path: Path, state: dict[str, Tensor], optimizer: str
) -> None:
    net = nn.DataParallel(Published(state))
    steps: dict[str, torch.optim.Optimizer] = {
        "Lion": Lion(net.parameters(), lr=1e-3),
        "AdamW": torch.optim.AdamW(net.parameters(), lr=1e-3),
        "SGD": torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9),
    }
    step = steps[optimizer]
    by_hand = torch.optim.lr_scheduler.LambdaLR(step, lambda epoch: 1 / (1 + epoch))
    net().backward()
    step.step()
    by_hand.step()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(step, 10)
    trained = net.state_dict()
    files = {
        "checkpoint.pth.tar": {
            "epoch": 2,
            "arch": "CRATE_tiny",
            "state_dict": trained,
            "best_acc1": torch.tensor(1.5),
            "optimizer": step.state_dict(),
            "scheduler": by_hand.state_dict(),
        },
        "CRATE_tiny-16-ckpt.t7": {
            "model": trained,
            "optimizer": step.state_dict(),
            "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "scheduler": cosine.state_dict(),
        },
        "older.t7": {"net": trained, "acc": 97.5, "epoch": 7},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        weights = read_weights(tmp_path / name)
        assert_equal(to_reference(weights.state_dict, "module."), dict(trained))
    prepared = {"eval_fit": "stretch", "resize_filter": "bilinear"}
    assert read_weights(tmp_path / "older.t7").meta == {"acc": 97.5, "epoch": 7, **prepared}


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion"])
def test_the_published_training_code_resumes_from_what_is_written(
    tmp_path: Path, state: dict[str, Tensor], optimizer: str
) -> None:
    """What its --resume does with a file: the epoch, the accuracy, and the states of model, optimizer and scheduler."""
    values = {"optim.name": optimizer.lower(), "optim.lr": 3e-4, "optim.weight_decay": 0.3, "optim.betas": None}
    meta = {"epochs": 7.0, "metrics": {"val/top1": 61.5}, "resize_filter": "bicubic", "recipe_values": values}
    export_reference(tmp_path / "ours.pth.tar", SMALL, state, meta)
    assert read_weights(tmp_path / "ours.pth.tar").meta["resize_filter"] == "bicubic"  # and not the published code's

    net = nn.DataParallel(Published({name: torch.zeros_like(tensor) for name, tensor in state.items()}))
    kind = {"AdamW": torch.optim.AdamW, "Lion": Lion}[optimizer]
    step = kind(net.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(step, lambda epoch: 1 / (1 + epoch))
    checkpoint = torch.load(tmp_path / "ours.pth.tar", weights_only=True)
    net.load_state_dict(checkpoint["state_dict"])
    step.load_state_dict(checkpoint["optimizer"])
    schedule.load_state_dict(checkpoint["scheduler"])
    assert (checkpoint["epoch"], checkpoint["best_acc1"].to("cpu").item()) == (7, 61.5)
    assert_equal(dict(net.module.state_dict()), to_reference(state))

    net().backward()
    step.step()  # and training can go on
    schedule.step()
    (group,) = step.param_groups
    assert group["lr"] == pytest.approx(3e-4 / 9)
    assert (group["weight_decay"], group["betas"][1]) == (0.3, 0.99 if optimizer == "Lion" else 0.999)
    assert not torch.equal(net.module.state_dict()["mlp_head.1.weight"], state["head.linear.weight"])


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    depth=st.integers(1, 12),
    patch_size=st.integers(1, 4),
    side=st.integers(1, 4),
    num_classes=st.integers(1, 5),
)
def test_names_and_shapes_survive_at_any_dimensions(
    heads: int, width: int, depth: int, patch_size: int, side: int, num_classes: int
) -> None:
    config = ModelConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        num_classes=num_classes,
        dim=heads * width,
        depth=depth,
        heads=heads,
    )
    state = initialise(config, seed=0).state_dict()
    assert_equal(from_reference(to_reference(state, "module.")), state)
    assert_equal(from_reference(state), state)
    assert infer_config(state, heads=heads) == config


def test_what_the_published_layout_has_no_place_for_is_written_beside_it_and_read_again(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(SMALL, pool="mean", ista_step=0.2, ista_threshold=0.3, norm_eps=1e-6, head_norm_eps=1e-7)
    meta = {"mean": [0.5] * 3, "std": [0.25] * 3, "eval_crop": 1.0, "resize_filter": "bicubic", "precision": "bf16"}
    meta["classes"] = list("abcdefg")
    export_model(tmp_path / "ours.pt", config, state, meta)
    main(["convert", str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pth.tar"), "--to", "reference"])
    one, other = (load_trained(tmp_path / name) for name in ("ours.pt", "theirs.pth.tar"))
    assert other.model.config == one.model.config == config
    assert (other.data, other.classes, other.precision) == (one.data, one.classes, one.precision)
    for said in (
        "pool is cls, this model's mean",
        "ista_step is 0.1, this model's 0.2",
        "ista_threshold",
        "norm_eps is 1e-05, this model's 1e-06",
        "mean",
        "std",
    ):
        assert f"the published code computes something else from these weights: its {said}" in caplog.text
    caplog.clear()
    export_reference(tmp_path / "plain.pth.tar", SMALL, state, {"mean": [0.485, 0.456, 0.406]})
    export_reference(tmp_path / "unread.pth.tar", replace(SMALL, ratio=2, layer_scale=0.5), state)  # by no part
    assert caplog.text == ""


@pytest.mark.parametrize("odd", [{"pool": "sum", "ista_step": "0.3", "heads": True}, {"pool": 0.5, "ista_step": None}])
def test_what_a_file_cannot_mean_is_not_taken_from_it(
    tmp_path: Path, state: dict[str, Tensor], odd: dict[str, Any]
) -> None:
    torch.save({"state_dict": to_reference(state), **odd}, tmp_path / "theirs.pth.tar")
    assert load_model(tmp_path / "theirs.pth.tar", heads=3)[0].config == SMALL
    torch.save({"state_dict": to_reference(state), "mean": torch.ones(2)}, tmp_path / "theirs.pth.tar")
    with pytest.raises(WeightsError, match="how its images are prepared"):
        load_trained(tmp_path / "theirs.pth.tar", heads=3)


def test_heads_of_a_published_size_need_not_be_given_and_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = build_model(ModelSection(arch="crate_tiny", image_size=32), 10, seed=0).state_dict()
    torch.save({"state_dict": to_reference(state)}, tmp_path / "theirs.pth.tar")
    assert load_model(tmp_path / "theirs.pth.tar")[0].config.heads == 6
    assert "does not tell its heads: 6 taken, as in the published crate_tiny" in caplog.text
    assert "does not tell its heads: 6 taken" in describe(tmp_path / "theirs.pth.tar")
    caplog.clear()
    assert load_model(tmp_path / "theirs.pth.tar", heads=3)[0].config.heads == 3
    assert caplog.text == ""


def test_heads_of_a_published_width_at_other_patches_have_to_be_given(tmp_path: Path) -> None:
    """The published demo has the width of CRATE-B, patches of 8 pixels, and 6 heads."""
    config = ModelConfig(image_size=16, patch_size=8, num_classes=10, dim=768, depth=12, heads=6)
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    state = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in shapes.items()}
    with pytest.raises(WeightsError, match=r"width 768 and depth 12 with patches of 8 pixels.*--heads"):
        infer_config(state)
    assert infer_config(state, heads=6) == config


def test_a_file_that_tells_its_heads_is_believed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    export_model(tmp_path / "ours.pt", SMALL, state)
    export_reference(tmp_path / "theirs.pth.tar", SMALL, state)
    for name in ("ours.pt", "theirs.pth.tar"):
        assert load_model(tmp_path / name)[0].config.heads == load_model(tmp_path / name, heads=3)[0].config.heads == 3
        with pytest.raises(WeightsError, match="its model has 3 heads, and 4 were given"):
            load_model(tmp_path / name, heads=4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_head_behind_the_published_one_is_joined_with_it_and_any_other_is_left_out(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    images, head = torch.rand(2, 3, 16, 16), nn.Linear(24, 9)
    beside = {f"{prefix}head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save({"state_dict": to_reference(state, prefix) | beside}, tmp_path / "left_over.pt")
    model, _ = load_model(tmp_path / "left_over.pt", heads=3)
    assert_equal(dict(model.state_dict()), state)
    assert "head.* left out" in caplog.text
    features = initialise(replace(SMALL, num_classes=24), seed=4).eval()  # as in the published demo
    torch.save({"model": to_reference(features.state_dict(), prefix) | beside}, tmp_path / "demo.pt")
    model, _ = load_model(tmp_path / "demo.pt", heads=3)
    assert torch.allclose(model.eval()(images), head(features(images)), atol=1e-5)
    assert "joined with mlp_head.1" in caplog.text


def test_an_export_keeps_the_architecture_the_meta_and_the_dtype(tmp_path: Path, state: dict[str, Tensor]) -> None:
    config = ModelConfig(**{**vars(SMALL), "pool": "mean", "ista_step": 0.2, "ista_threshold": 0.05})
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    export_model(tmp_path / "model.pt", config, rounded, {"step": 12, "top1": 0.5, "shape": (1, 2)})
    model, meta = load_model(tmp_path / "model.pt")
    assert model.config == config
    assert meta == {"step": 12, "top1": 0.5, "shape": [1, 2]}
    assert_equal(dict(model.state_dict()), rounded)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_plain_crate_s_exports_are_those_of_the_first_format_and_others_say_that_they_are_not(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """The version before has a config of these keys alone, and refuses a format that it does not know."""
    first = {"image_size", "patch_size", "num_classes", "dim", "depth", "heads", "pool", "dropout", "emb_dropout"}
    first |= {"arch", "ista_step", "ista_threshold"}
    for config, expected in ((SMALL, "crate-dist/1"), (replace(SMALL, norm_eps=1e-6), "crate-dist/2")):
        for write in (export_model, export_safetensors):
            write(path := tmp_path / write.__name__, config, state)
            assert load_model(path)[0].config == config
        content = torch.load(tmp_path / "export_model", weights_only=True)
        assert content["format"] == expected
        assert (content["model"].keys() == first) == (expected == "crate-dist/1")


def test_an_export_holds_no_more_than_its_tensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    flat = torch.zeros(10_000_000)  # ZeRO keeps parameters as views of one buffer
    views = {name: flat[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}
    export_model(tmp_path / "model.pt", SMALL, views)
    assert (tmp_path / "model.pt").stat().st_size < 1_000_000


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    export_model(path, SMALL, state, {"step": 1})

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.pt"):
        export_model(path, SMALL, state, {"step": 2})
    with pytest.raises(TypeError):
        export_model(path, SMALL, state, {"step": object()})
    with pytest.raises(WeightsError, match="missing 'cls_token'"):
        export_model(path, SMALL, {name: tensor for name, tensor in state.items() if name != "cls_token"})
    assert list(tmp_path.iterdir()) == [path]
    assert load_model(path)[1] == {"step": 1}


def test_safetensors_carry_the_weights_the_architecture_and_the_meta(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    meta = {"step": 12, "metrics": {"val/top1": 50.5}, "classes": ["käse", "wurst"]}
    config = ModelConfig(**{**vars(SMALL), "pool": "mean"})
    export_safetensors(path, config, {name: tensor.bfloat16() for name, tensor in state.items()}, meta)
    model, found = load_model(path)  # heads and pool are in the file
    assert (model.config, found) == (config, meta)
    for name, tensor in safetensors.torch.load_file(path).items():  # as any other program reads them
        assert torch.equal(tensor, state[name].bfloat16())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(WeightsError, match="missing 'cls_token'"):
        export_safetensors(path, SMALL, {name: tensor for name, tensor in state.items() if name != "cls_token"})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("naming", ["ours", "theirs"])
def test_safetensors_of_others_are_read_under_either_naming(
    tmp_path: Path, state: dict[str, Tensor], naming: str, prefix: str
) -> None:
    given = state if naming == "ours" else to_reference(state)
    safetensors.torch.save_file({prefix + name: tensor for name, tensor in given.items()}, tmp_path / "any.bin")
    assert read_weights(tmp_path / "any.bin").kind == "safetensors"
    model, meta = load_model(tmp_path / "any.bin", heads=3)
    assert meta == ({} if naming == "ours" else {"resize_filter": "bilinear"})
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_safetensors_that_are_damaged_or_say_what_cannot_be_are_refused(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(path, SMALL, state)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:9], b"<html>404</html>", b""):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"model\.safetensors is no safetensors file, or truncated or damaged"):
            read_weights(path)
    plain = vars(SMALL)
    for about, message in [
        ({"crate_dist": "crate-dist/9"}, "reads 'crate-dist/1'"),
        ({"crate_dist": "crate-dist/1"}, "no whole crate-dist/1 export"),
        ({"crate_dist": "crate-dist/1", "model": "[]", "meta": "{}"}, "no whole crate-dist/1 export"),
        ({"crate_dist": "crate-dist/1", "model": '{"dim": 2}', "meta": "{}"}, "no whole crate-dist/1 export"),
        ({"crate_dist": "crate-dist/1", "model": json.dumps(plain), "meta": "{"}, "no whole crate-dist/1 export"),
        (
            {"crate_dist": "crate-dist/1", "model": json.dumps(plain | {"depth": 10**12}), "meta": "{}"},
            "too few for a model of 1,000,000,000,000 layers",
        ),
    ]:
        safetensors.torch.save_file(state, path, about)
        with pytest.raises(WeightsError, match=message):
            load_model(path)


def test_weights_that_do_not_fit_are_named(state: dict[str, Tensor]) -> None:
    broken = dict(state)
    broken["layers.1.ista.dictionery"] = broken.pop("layers.1.ista.dictionary")
    broken["head.linear.bias"] = torch.zeros(9)
    with pytest.raises(WeightsError) as caught:
        check_fit(broken, SMALL)
    assert str(caught.value).splitlines()[1:] == [
        "  missing 'layers.1.ista.dictionary'",
        "  unexpected 'layers.1.ista.dictionery' (nearest: 'layers.1.ista.dictionary')",
        "  'head.linear.bias' has shape (9,), the model has (7,)",
    ]
    with pytest.raises(WeightsError, match="and 8 more"):
        check_fit({name: tensor for name, tensor in state.items() if "layers" not in name}, SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 1, "args": 2}, "expected a state dict, names and tensors, but it holds epoch, args"),
        ({"state_dict": {}}, "is empty"),
        ([1, 2], "holds a list"),
        ({"format": "crate-dist/9"}, "reads 'crate-dist/1'"),
        ({"format": "crate-dist/1"}, "no whole crate-dist/1 export"),
        ({"state_dict": {}, "args": SimpleNamespace()}, "could run code"),
        ({"pos_embed": torch.zeros(1, 5, 8)}, "there is no 'pos_embedding' \\(nearest: 'pos_embed'\\)"),
    ],
)
def test_a_file_that_holds_something_else_says_so(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(WeightsError, match=message) as caught:
        load_model(tmp_path / "file.pt")
    assert "file.pt" in str(caught.value)


def test_a_damaged_file_is_not_taken_for_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "model.pt"
    export_model(path, SMALL, state)
    whole = path.read_bytes()
    marker = state["layers.0.ista.dictionary"].numpy().tobytes()
    flipped = bytearray(whole)
    flipped[whole.index(marker) + 100] ^= 1
    for content, message in [
        (whole[: len(whole) // 2], "truncated or damaged"),
        (whole[:-1], "truncated or damaged"),
        (bytes(flipped), "checksum"),
        (b"", "no PyTorch checkpoint"),
        (b"<html>404</html>", "no PyTorch checkpoint"),
    ]:
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            read_weights(path)
    with pytest.raises(WeightsError, match="is a folder"):
        read_weights(tmp_path)
    with pytest.raises(WeightsError, match="No such file"):
        read_weights(tmp_path / "nothing.pt")


def test_unpublished_sizes_ask_for_their_heads() -> None:
    with pytest.raises(WeightsError, match="width 48 and depth 3"):
        load_model(CHECKPOINT)
    with pytest.raises(WeightsError, match="does not divide into 5 heads"):
        load_model(CHECKPOINT, heads=5)
    assert "--heads" in describe(CHECKPOINT)


def test_a_description_is_a_table_that_lists_a_thousand_classes_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 1000, seed=0)
    metrics = {"val/top1": 70.8123456, "val/loss": None}
    meta = {"classes": [f"n{number:08d}" for number in range(1000)], "metrics": metrics, "recipe": "a\x1b[2Jb\nc"}
    export_model(tmp_path / "model.pt", model.config, model.state_dict(), meta)
    main(["describe", str(tmp_path / "model.pt")])
    shown = capsys.readouterr().out
    assert "1,000: n00000000, n00000001, n00000002, n00000003, n00000004, … (--classes lists them)\n" in shown
    assert re.search(r"^metrics\n  val/top1 +70.8123\n  val/loss +none\nrecipe +a\[2Jbc$", shown, re.MULTILINE)
    assert "{" not in shown
    assert "n00000999" not in shown
    main(["describe", str(tmp_path / "model.pt"), "--classes"])
    assert re.search(r"^  999 +n00000999$", capsys.readouterr().out, re.MULTILINE)


def test_the_command_describes_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pth.tar"
    main(["convert", str(CHECKPOINT), str(ours), "--to", "crate-dist", "--heads", "4"])
    main(["convert", str(ours), str(theirs), "--to", "reference", "--bare-names"])
    content = torch.load(theirs, weights_only=True)["state_dict"]
    assert_equal(content, to_reference(read_weights(CHECKPOINT).state_dict))
    capsys.readouterr()
    main(["describe", str(ours)])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["kind", "crate-dist"], ["heads", "4"], ["parameters", "32,650"], ["epoch", "3"]):
        assert row in shown
    with pytest.raises(SystemExit, match="--force replaces it"):
        main(["convert", str(ours), str(theirs), "--to", "reference"])
    main(["convert", str(ours), str(theirs), "--to", "reference", "--force"])
    tensors = tmp_path / "tensors.safetensors"
    main(["convert", str(theirs), str(tensors), "--to", "safetensors", "--heads", "4"])
    assert re.search(r"^kind +safetensors$", capsys.readouterr().out, re.MULTILINE)
    main(["convert", str(tensors), str(theirs), "--to", "reference", "--force"])
    assert_equal(
        torch.load(theirs, weights_only=True)["state_dict"], torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    )
    cards = {path.name for path in tmp_path.glob("*.md")}
    assert cards == {"ours.md", "theirs.md", "tensors.md"}
    with pytest.raises(SystemExit, match="error: cannot read"):
        main(["describe", str(tmp_path / "nothing.pt")])
