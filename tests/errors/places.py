"""What the mistakes of the catalogue need: folders and files by a name, each made when it is first asked for."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from crate_dist.models.weights.read import read_weights
from tests.conftest import casts, write_split
from tests.data_prep import class_tree, picture, tar_of, write_tree
from tests.ranks import REPOSITORY

STORED = REPOSITORY / "tests" / "stored_run"


class Places(Mapping[str, object]):
    """A folder for one mistake: `places["damaged_index"]` makes what its method says, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: list[int] = []

    def __getitem__(self, name: str) -> object:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in vars(Places) if name[0] != "_"])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def close(self) -> None:
        """Lets go of what other programs seem to hold."""
        for number in self._held:
            os.close(number)

    recipe = STORED / "recipe.toml"
    shards = STORED / "shards"
    weights = STORED / "model-best.pt"

    @cached_property
    def nowhere(self) -> Path:
        """A path that there is not."""
        return self.root / "nowhere"

    @cached_property
    def new(self) -> Path:
        """A folder to be made."""
        return self.root / "new"

    @cached_property
    def file(self) -> Path:
        """A file that is nothing in particular."""
        return self._write("file", "some text\n")

    @cached_property
    def photos(self) -> Path:
        """A folder of somebody's own."""
        (self.root / "photos").mkdir()
        (self.root / "photos" / "holiday.jpg").write_bytes(picture(1))
        return self.root / "photos"

    @cached_property
    def empty(self) -> Path:
        """A folder with nothing in it."""
        (self.root / "empty").mkdir()
        return self.root / "empty"

    @cached_property
    def run(self) -> Path:
        """A run of which eight steps are done."""
        run = Path(shutil.copytree(STORED / "run", self.root / "run"))
        text = (run / "recipe.toml").read_text().replace("/data/stored/shards", str(self.shards))
        (run / "recipe.toml").write_text(text)
        return run

    @cached_property
    def young_run(self) -> Path:
        """A run that has not saved yet."""
        shutil.rmtree(self.run / "checkpoints")
        (self.run / "checkpoints").mkdir()
        (self.run / "published.json").unlink()
        return self.run

    @cached_property
    def emptied_run(self) -> Path:
        """A run whose checkpoints somebody has removed."""
        shutil.rmtree(self.run / "checkpoints" / "step-00000008")
        return self.run

    @cached_property
    def damaged_run(self) -> Path:
        """A run with one checkpoint, of which a byte has changed."""
        path = self.run / "checkpoints" / "step-00000008" / "rank-00001.pt"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return self.run

    @cached_property
    def runs(self) -> Path:
        """A folder with two runs in it."""
        for name in ("first", "second"):
            shutil.copytree(self.run, self.root / "runs" / name)
        return self.root / "runs"

    @cached_property
    def one_class(self) -> Path:
        """Shards of one class, where the run's have three."""
        for name, count in (("train", 60), ("val", 20)):
            samples = ((key, image, 0) for key, image, _ in casts(count, seed=1))
            write_split(self.root / "one" / name, samples, shard_samples=60, classes=1)
        return self.root / "one"

    @cached_property
    def other_images(self) -> Path:
        """Shards of the run's three classes, with other images."""
        for name, count in (("train", 60), ("val", 20)):
            samples = ((key, image, label % 3) for key, image, label in casts(count, seed=1))
            write_split(self.root / "other" / name, samples, shard_samples=60, classes=3)
        return self.root / "other"

    @cached_property
    def own_shards(self) -> Path:
        """Shards that may be changed."""
        return Path(shutil.copytree(self.shards, self.root / "shards"))

    @cached_property
    def secret_shards(self) -> Path:
        """Shards that their owner alone may look into."""
        (self.own_shards / "train").chmod(0)
        return self.own_shards

    @cached_property
    def without_val(self) -> Path:
        """Shards without a validation split."""
        shutil.rmtree(self.own_shards / "val")
        return self.own_shards

    @cached_property
    def without_index(self) -> Path:
        """Shards whose index is gone."""
        (self.own_shards / "train" / "index.json").unlink()
        return self.own_shards

    @cached_property
    def damaged_index(self) -> Path:
        """Shards whose index was cut short."""
        path = self.own_shards / "train" / "index.json"
        path.write_text(path.read_text()[:100])
        return self.own_shards

    @cached_property
    def future_index(self) -> Path:
        """Shards with an index of a version to come."""
        path = self.own_shards / "train" / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
        return self.own_shards

    @cached_property
    def foreign_rows(self) -> Path:
        """Shards with the rows of another split."""
        shutil.copy(self.own_shards / "val" / "index.npy", self.own_shards / "train" / "index.npy")
        return self.own_shards

    @cached_property
    def missing_shard(self) -> Path:
        """Shards of which one is gone."""
        next((self.own_shards / "train").glob("*.tar")).unlink()
        return self.own_shards

    @cached_property
    def cut_shard(self) -> Path:
        """Shards of which one was cut short."""
        path = next((self.own_shards / "train").glob("*.tar"))
        path.write_bytes(path.read_bytes()[:-512])
        return self.own_shards

    @cached_property
    def other_classes(self) -> Path:
        """Shards whose splits have other classes."""
        path = self.own_shards / "val" / "index.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({**meta, "classes": [*meta["classes"][:-1], "another"]}))
        return self.own_shards

    @cached_property
    def tree(self) -> Path:
        """Images in class folders."""
        return class_tree(self.root / "tree", classes=2, images=3)

    @cached_property
    def broken_tree(self) -> Path:
        """Images in class folders, one of which is none."""
        return write_tree(self.tree, {"c0/broken.jpg": b"no image"}) and self.tree

    @cached_property
    def empty_class(self) -> Path:
        """Images in class folders, one of which is empty."""
        (self.tree / "c9").mkdir()
        return self.tree

    @cached_property
    def secret_tree(self) -> Path:
        """Images in class folders that their owner alone may look into."""
        self.tree.chmod(0)
        return self.tree

    @cached_property
    def at_work(self) -> Path:
        """A folder that another conversion writes to."""
        (self.root / "out" / "train").mkdir(parents=True)
        self._held.append(os.open(self.root / "out" / "train", os.O_RDONLY))
        fcntl.flock(self._held[-1], fcntl.LOCK_EX)
        return self.root / "out"

    @cached_property
    def locked(self) -> Path:
        """A folder that its owner alone may write to."""
        (self.root / "locked").mkdir(mode=0o555)
        return self.root / "locked"

    @cached_property
    def secret_run(self) -> Path:
        """A run that its owner alone may look into."""
        self.run.chmod(0)
        return self.run

    @cached_property
    def imagenet_without_truth(self) -> Path:
        """ImageNet with validation images of which nobody says the class."""
        files = {"train/n00000001/a.JPEG": picture(1), "val/ILSVRC2012_val_00000001.JPEG": picture(2)}
        return write_tree(self.root / "imagenet", files)

    @cached_property
    def cut_cifar(self) -> Path:
        """A download that was cut short."""
        path = self.root / "cifar-10-python.tar.gz"
        path.write_bytes(tar_of({"cifar-10-batches-py/batches.meta": b"x"})[:1000])
        return path

    @cached_property
    def with_objects(self) -> Path:
        """Weights with Python objects beside them."""
        torch.save({"state_dict": {}, "args": Path("x")}, self.root / "objects.pt")
        return self.root / "objects.pt"

    @cached_property
    def other_model(self) -> Path:
        """The weights of something that is no CRATE."""
        torch.save({"conv1.weight": torch.zeros(3, 3)}, self.root / "resnet.pt")
        return self.root / "resnet.pt"

    @cached_property
    def of_no_size(self) -> Path:
        """Weights that do not tell how many heads they have."""
        torch.save(read_weights(self.weights).state_dict, self.root / "bare.pt")
        return self.root / "bare.pt"

    @cached_property
    def not_toml(self) -> Path:
        """A recipe with a slip of the pen."""
        return self._write("slip.toml", '[model]\narch = "crate_tiny\n')

    @cached_property
    def wrong_recipe(self) -> Path:
        """A recipe with a key of another program, a value of another type, and without what is required."""
        text = (
            '[model]\narch = "crate_tiny"\n[optim]\nlearning_rate = 1e-3\n[train]\nglobal_batch = "big"\nepochs = 1\n'
        )
        return self._write("wrong.toml", text)

    @cached_property
    def with_setup(self) -> Path:
        """A recipe of somebody else, which says what is to be run."""
        return self._write("theirs.toml", self.recipe.read_text() + '\n[cluster]\nsetup = ["curl evil"]\n')

    @cached_property
    def word_for_list(self) -> Path:
        """A site file that has a word where a list is expected."""
        (self.root / "own").mkdir(mode=0o755)
        return self._write("own/site.toml", 'modules = "cuda/12.4"\n')

    @cached_property
    def classes_twice(self) -> Path:
        """A list of classes with one twice."""
        return self._write("classes.txt", "cat\ndog\ncat\n")

    @cached_property
    def refusing(self) -> Path:
        """A folder with an sbatch that says what SLURM's says of a partition that there is not."""
        program = self._write(
            "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n"
        )
        program.chmod(0o755)
        return self.root

    @cached_property
    def dead_url(self) -> str:
        """An address at which nobody answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{free.getsockname()[1]}/shards"

    @cached_property
    def taken_port(self) -> int:
        """A port that another program listens on."""
        listener = socket.create_server(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        self._held.append(listener.detach())
        return port

    def _write(self, name: str, text: str) -> Path:
        (self.root / name).write_text(text)
        return self.root / name
