"""The pages keep their word: commands run, links lead somewhere; files, keys and messages are those of the program.

Every command in README.md and docs/ is run here in a small world that has what the pages take for granted; or it stands
in ELSEWHERE, with the reason why not and with what runs it. A command that does neither fails.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from pydantic import BaseModel

import crate_dist
from crate_dist.config import Recipe
from tests.data_prep import picture, write_tree
from tests.ranks import REPOSITORY

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
TEXT = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in PAGES}

ELSEWHERE = {
    "source .venv/bin/activate": ("it changes the shell that it is typed in", "Makefile"),
    "tensorboard --logdir runs": ("a server, which does not end", "tests/training/test_tensorboard.py"),
    "python -m tests.browser runs/demo docs/pictures/dashboard.png": (
        "needs a browser, and writes where the page's picture is",
        "tests/training/test_dashboard.py",
    ),
    "make setup": ("it installs", "Makefile"),
    "pip install -e '.[wandb]'": ("it installs", "Makefile"),
    "python launch/local.py --arch crate_tiny --data DIR --set log.trackers=tensorboard,wandb": (
        "the service is somebody else's",
        "tests/training/test_wandb.py",
    ),
    "make demo": ("it trains for a minute", "launch/demo.py"),
    "python -m crate_dist.doctor": ("it measures", "tests/doctor/test_doctor.py"),
    "python -m crate_dist.doctor --full --budget 540 --json doctor.json": (
        "minutes of training",
        "tests/doctor/test_doctor.py",
    ),
    "srun python -m crate_dist.doctor --full --only between": ("needs SLURM", "tests/cluster/test_doctor.py"),
    "python -m crate_dist.evaluate runs/crate_base --throughput --batch 256": (
        "it compiles for a minute",
        "tests/evaluation/test_sets.py",
    ),
    "python -m crate_dist.evaluate runs/crate_base --data /data/imagenet-shards --real real.json"
    " --also /data/imagenetv2 /data/imagenet-a /data/imagenet-r /data/imagenet-sketch /data/imagenet-c"
    " --json all.json": ("needs ImageNet and its variants", "tests/evaluation/test_sets.py"),
    "make test": ("it is what runs this", "Makefile"),
    "make lint": ("it looks at code, not at pages", "Makefile"),
    "python -m pytest tests/test_floors.py": ("a test", "tests/test_floors.py"),
    "python launch/local.py --arch crate_tiny --data https://example.org/imagenet-shards": (
        "the server is nobody's",
        "tests/data/test_cache.py",
    ),
    "python launch/local.py --arch crate_tiny --data 'pipe:ssh store cat /data/imagenet-shards/{}'": (
        "the host is nobody's",
        "tests/data/test_cache.py",
    ),
    "python launch/status.py logs runs/crate_base --rank 3 --follow": (
        "it does not end",
        "tests/watching/test_stopping.py",
    ),
    "python launch/slurm.py --arch crate_large --nodes 4 --data /data/imagenet-shards "
    "--set checkpoint.mirror=s3://bucket/runs": ("the bucket is nobody's", "tests/checkpoint/test_mirror.py"),
    "srun python -m crate_dist.train --arch crate_tiny --data DIR": ("needs SLURM", "tests/cluster/test_launch.py"),
    "torchrun --nproc-per-node 2 -m crate_dist.train --arch crate_tiny --data DIR": (
        "it would train",
        "tests/training/test_train.py",
    ),
    "python -m crate_dist.train --arch crate_tiny --data DIR": ("it would train", "tests/training/test_train.py"),
    "python data_prep/cifar.py --source cifar-10-python.tar.gz --out /data/cifar10-shards": (
        "needs the published archive",
        "tests/prep/test_cifar.py",
    ),
    "python data_prep/flowers.py --source /data/downloads --out /data/flowers-shards": (
        "needs the published archives",
        "tests/prep/test_flowers.py",
    ),
    "python data_prep/pets.py --source /data/downloads --out /data/pet-shards": (
        "needs the published archives",
        "tests/prep/test_pets.py",
    ),
    "python data_prep/imagenet21k.py --source /data/winter21_whole --out /data/imagenet21k-shards --val-per-class 50": (
        "needs the published archive",
        "tests/prep/test_imagenet21k.py",
    ),
    "python data_prep/index.py /data/shards --label json:label --classes synset_words.txt": (
        "needs shards of somebody else's",
        "tests/prep/test_check.py",
    ),
    "python data_prep/index.py '/data/in1k-train-{000000..001281}.tar' --out /data/splits/train": (
        "needs 1,282 shards of somebody else's",
        "tests/prep/test_check.py",
    ),
    "python -m tests.chaos --seed 31337": ("half an hour", "tests/test_chaos.py"),
    "python benchmarks/pixels.py --source DIR": ("needs ImageNet's own images", "benchmarks/pixels.py"),
}
"""Command -> why it is not run here, and the file that runs it or says what it is."""

FITTING = {
    "launch/local.py": ["--dry-run", "--run-dir", "runs/new", "--set", "train.global_batch=32"],
    "launch/prep.py": ["--dry-run"],
    "launch/slurm.py": ["--dry-run", "--run-dir", "runs/new", "--set", "train.global_batch=64"],
    "--init-from": ["--set", "model.arch=crate_demo"],
    "checkpoint.pth.tar": ["--heads", "4"],
}
"""What a command with this in it gets besides: nothing is trained, the data are few, the run to begin from is small."""


class Command(NamedTuple):
    """What a reader would type, as it stands on a page."""

    page: str
    line: str


def commands() -> Iterator[Command]:
    """In fenced blocks, and in code spans that begin a program with options."""
    for page, text in TEXT.items():
        for _, language, block in re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            if language:
                continue
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                line = re.sub(r"\s+#.*|\s+->.*", "", line.strip())
                if re.match(r"(python|make|torchrun|srun|tensorboard|source|cp|pip|git)\s", line):
                    yield Command(page, " ".join(line.split()))
        prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
        for line in re.findall(r"`((?:python|torchrun|srun)\s[^`]*--[^`]*)`", prose):
            yield Command(page, line)


RUN_HERE = sorted({line for _, line in commands() if line not in ELSEWHERE})
HACKING = [line for page, line in commands() if page == "docs/hacking.md" and "make" not in line]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, by far where other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: images, shards, a trained run, files of weights, photos.

    What stands below /data on the pages is below data/ here.
    """
    folder = tmp_path_factory.mktemp("reader")
    images = {
        f"{split}/n0144000{label}/{number}.JPEG": picture(1000 * label + number, (40, 32))
        for split, count in (("train", 60), ("val", 8))
        for label in range(4)
        for number in range(count)
    }
    write_tree(folder / "data/ILSVRC2012", images)
    write_tree(folder / "data/photos", {name.partition("/")[2]: data for name, data in images.items()})
    (folder / "imagenet-sample").symlink_to("data/ILSVRC2012")
    converted = ["--source", folder / "data/ILSVRC2012", "--out", folder / "data/imagenet-shards", "--workers", "1"]
    _program("data_prep/imagenet.py", *map(str, converted), cwd=folder)
    (folder / "runs").mkdir()
    (folder / "cifar10").symlink_to("data/ILSVRC2012")
    _program("data_prep/image_folder.py", "--source", "cifar10", "--out", "cifar10-shards", cwd=folder)
    for alias in ("DIR", "imagenet-sample-shards", "runs/demo-shards", "data/cifar10-shards", "data/flowers-shards"):
        (folder / alias).symlink_to(folder / "data/imagenet-shards")
    run = folder / "runs/crate_base"
    small = {"train.max_steps": 2, "data.workers": 0, "log.whitebox_every_steps": 0, "train.global_batch": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        crate_dist.fit("demo", folder / "data/imagenet-shards", run_dir=run, settings=small, ranks=1)
    for alias in ("pictures", "demo", "crate_small"):
        (folder / "runs" / alias).symlink_to("crate_base")
    shutil.copy(run / "model-best.pt", folder)
    shutil.copy(REPOSITORY / "tests/golden/crate_reference_checkpoint.pth.tar", folder / "checkpoint.pth.tar")
    mask = io.BytesIO()
    Image.fromarray(np.eye(32, 40, dtype=np.uint8) * 255).save(mask, "PNG")
    write_tree(folder / "photos", {f"{name}.jpg": picture(number, (40, 32)) for number, name in enumerate("de")})
    write_tree(folder, {f"{name}.jpg": picture(number, (40, 32)) for number, name in enumerate("abc")})
    write_tree(folder, {f"{name}.jpg": picture(9, (40, 32)) for name in ("flower", "china", "rocket")})
    write_tree(folder, {"chelsea.png": picture(8, (40, 32), format="PNG")})
    write_tree(folder / "truth", {f"{name}.png": mask.getvalue() for name in "de"})
    return folder


def _program(path: str, *arguments: str, cwd: Path, code: Path = REPOSITORY, timeout_s: float = 120) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "CRATE_DATA"} | {"PYTHONPATH": str(code)}
    line = [sys.executable, *([path] if path == "-m" else [str(code / path)]), *arguments]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _module(name: str, *arguments: str) -> None:
    module = importlib.import_module(f"{name}.__main__" if name.endswith((".weights", ".figures")) else name)
    assert not module.main(list(arguments))


@pytest.mark.parametrize("line", [line for line in RUN_HERE if line not in HACKING])
def test_a_command_of_the_pages_runs(line: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.delenv("CRATE_DATA", raising=False)
    line = re.sub(r"^torchrun --nproc-per-node 2 ", "python ", line)
    python, *words = (word.replace("/data/", f"{world}/data/") for word in shlex.split(line))
    assert python == "python", f"{line}: run it here, or say in ELSEWHERE why not"
    added = [word for text, more in FITTING.items() if text in words for word in more]
    if words[0] == "-m":
        _module(words[1], *words[2:], *added)
    else:
        _program(words[0], *words[1:], *added, cwd=world)


FOLLOWED = """
import sys
from pathlib import Path
import crate_dist
from crate_dist import evaluate
from crate_dist.config import load_recipe
from crate_dist.figures.__main__ import main as figures
from crate_dist.run.folder import RunFolder
from crate_dist.train import train

if __name__ == "__main__":
    overrides, evaluated, drawn = map(str.split, sys.argv[1:])
    for steps in (2, 3):
        recipe = load_recipe("demo", [*overrides, f"train.max_steps={steps}"], data__root="runs/demo-shards")
        result = train(Path("runs/denoising"), recipe=recipe, by_a_person=True)
    assert not evaluate.main(evaluated)
    assert not figures(drawn)
    model = crate_dist.load("runs/denoising/model-last.pt")
    mixer, weights = model.layers[0].mixer, dict(model.layers[0].named_parameters())
    print(type(mixer).__name__, mixer.step, sorted(weights))
"""


@pytest.fixture
def clone(world: Path, tmp_path: Path) -> Path:
    """A copy of the program, beside the runs and shards of the world."""
    clone = tmp_path / "clone"
    for folder in ("crate_dist", "configs", "launch", "docs"):
        shutil.copytree(REPOSITORY / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "runs").mkdir()
    for path in (world / "runs").iterdir():
        (clone / "runs" / path.name).symlink_to(path.resolve())
    return clone


def _insert(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, before + after), encoding="utf-8")


def test_an_operator_is_added_as_hacking_says(clone: Path) -> None:
    """One file and its rows, as they stand on the page: it trains, goes on, is evaluated, loaded and drawn."""
    page = TEXT["docs/hacking.md"]
    part = page[page.index("## Add an operator") : page.index("## Add a size")]
    (name,) = re.findall(r"The file, `([^`]+)`", part)
    (code,) = re.findall(r"^   ```python\n(.*?)^   ```", part, re.M | re.S)
    (rows,) = re.findall(r"^   ```text\n(.*?)^   ```", part, re.M | re.S)
    (clone / name).write_text(textwrap.dedent(code), encoding="utf-8")
    (row,) = textwrap.dedent(rows).splitlines()
    _insert(clone / "crate_dist/config/parts.py", "MIXERS = {\n", f"    {row}\n")
    listed = re.search(r"^3\. `python (-m crate_dist.config \S+)`", part, re.M)
    assert listed
    _program(*listed[1].split(), cwd=clone, code=clone)
    assert "token mixer: subspace_denoising, mssa" in (clone / "docs/training.md").read_text(encoding="utf-8")
    local, slurm, evaluated, drawn = (line for line in HACKING if "denoising" in line)
    for line in (local, slurm):
        program, *words = shlex.split(line.removeprefix("python "))
        said = _program(program, *words, "--set", "train.global_batch=32", cwd=clone, code=clone)
    assert "mixer = 'subspace_denoising' costs is not known" in said
    changes = {"train.global_batch": 16, "data.workers": 0, "log.whitebox_every_steps": 1, "log.every_steps": 1}
    overrides = [*re.findall(r"--set (\S+)", local), *(f"{key}={value}" for key, value in changes.items())]
    script = clone / "followed.py"
    script.write_text(FOLLOWED, encoding="utf-8")
    words = [line.split(maxsplit=3)[3] for line in (evaluated, drawn)]
    said = _program("followed.py", " ".join(overrides), *words, cwd=clone, code=clone, timeout_s=300)
    names = ["denoising.subspaces.weight", "denoising_norm.bias", "denoising_norm.weight"]
    assert f"SubspaceDenoising 0.5 {names}" in said
    log = "".join(path.read_text(encoding="utf-8") for path in (clone / "runs/denoising/logs").glob("*.log"))
    assert "resumed from" in log
    assert "MFU are left out: what mixer = 'subspace_denoising' costs is not known" in log
    lines = [json.loads(line) for line in (clone / "runs/denoising/metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} >= {1, 2, 3}
    measured = {key.split("/layer-")[0] for line in lines for key in line if key.startswith("whitebox/")}
    assert {"whitebox/power_share", "whitebox/coding_rate"} <= measured
    assert not {"whitebox/zeros", "whitebox/out_alignment"} & measured
    assert list((clone / "runs/denoising-figures").glob("layers*.npz"))


def test_a_recipe_and_a_size_are_added_as_hacking_says(clone: Path) -> None:
    row = '"crate_mini": Arch(dim=192, depth=6, heads=6),'
    _insert(clone / "crate_dist/config/archs.py", "ARCHS: dict[str, Arch] = {\n", f"    {row}\n")
    for line in HACKING:
        if line in ELSEWHERE or "denoising" in line:
            continue
        program, *words = shlex.split(line)
        if program == "cp":
            shutil.copy(*(clone / word for word in words))
        else:
            assert program == "python"
            batch = [] if words[0] == "-m" else ["--set", "train.global_batch=32"]
            said = _program(words[0], *words[1:], *batch, cwd=clone, code=clone)
            assert words[0] == "-m" or "my_recipe" in said or "runs/mini" in said
    assert "one of crate_mini, " in (clone / "docs/training.md").read_text()


def test_python_on_the_pages_runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page after the other, as in a notebook: what a block has made, the next one has."""
    monkeypatch.chdir(world)
    blocks = {page: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for page, text in TEXT.items()}
    assert len(blocks["docs/api.md"]) > 5
    for page, codes in blocks.items():
        names: dict[str, object] = {}
        for code in codes:
            exec(compile(code.replace("/data/", f"{world}/data/"), page, "exec"), names)


@pytest.mark.parametrize("notebook", sorted((REPOSITORY / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_what_it_made(notebook: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells are plain Python, and run here: a kernel would import everything once more."""
    (world / "docs").mkdir(exist_ok=True)
    monkeypatch.chdir(world / "docs")
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    outputs = [cell.outputs for cell in cells if cell.outputs]
    assert len(outputs) > 5, f"{notebook.name} is committed with what it made"
    assert not re.search(r"/home/|/root/|/tmp/|traceback", json.dumps(outputs).lower())
    names: dict[str, object] = {}
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in cells:
            exec(compile(cell.source, notebook.name, "exec"), names)
            if figures := plt.get_fignums():
                plt.figure(figures[-1]).canvas.draw()
                plt.close("all")


def test_what_is_not_run_here_is_on_a_page_and_run_elsewhere() -> None:
    lines = {line for _, line in commands()}
    assert not ELSEWHERE.keys() - lines
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert all(line.split()[1] in targets for line in lines if line.startswith("make "))
    assert all((REPOSITORY / place).is_file() for _, place in ELSEWHERE.values())


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {target}"


ROOTS = [REPOSITORY, REPOSITORY / "crate_dist"]
TO_BE_WRITTEN = re.compile(r"mydata|my_recipe|subspace_denoising")


@pytest.mark.parametrize("page", TEXT)
def test_files_that_a_page_names_are_there(page: str) -> None:
    tops = {path.name for root in ROOTS for path in root.iterdir() if path.is_dir()} - {"runs"}
    named = re.findall(r"`(?:python )?((?:\w+/)+[\w.]+\.(?:py|md|toml|sh))", TEXT[page])
    ours = [name for name in named if name.partition("/")[0] in tops and not TO_BE_WRITTEN.search(name)]
    assert not [name for name in ours if not any((root / name).is_file() for root in ROOTS)]


def test_the_house_names_the_modules_of_each_room() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| (.+) \|$", TEXT["docs/design.md"], re.M)
    assert len(rows) >= 9
    for room, words in rows:
        there = {path.stem for path in (REPOSITORY / "crate_dist" / room).iterdir() if path.stem[0] not in "_."}
        named = set(re.findall(r"`(\w+)/?`", words))
        assert named <= there
        assert room == "prep" or named == there


def _keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("page", TEXT)
def test_keys_that_a_page_names_are_keys_of_a_recipe(page: str) -> None:
    known = set(_keys())
    sections = {key.partition(".")[0] for key in known if "." in key} | {"data"}
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", TEXT[page], re.S))
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)(?![\w(./])", code)
    known |= {f"model.{name}" for name in dir(crate_dist.create("demo", classes=2))}  # a module's, from Python
    assert not {name for name in named if name not in known and not re.search(r"\.(py|md|json|pt)$", name)}


def _texts() -> list[str]:
    """Every text of the program, with … for what is filled in."""
    texts = []
    for path in [*(REPOSITORY / "crate_dist").rglob("*.py"), *(REPOSITORY / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[.\d]*[dfgs]( %%)?", "…", node.value))
    return texts


def test_messages_of_troubleshooting_are_messages_of_the_program() -> None:
    messages = re.findall(r"^\| `([^`]+)`(?:[^|]*) \| [^|]+ \|$", TEXT["docs/troubleshooting.md"], re.M)
    assert len(messages) > 40
    texts = _texts()
    for message in messages:
        pieces = [piece.strip() for piece in message.split("…")]
        found = re.compile(".*".join(map(re.escape, filter(None, pieces))), re.S)
        assert any(found.search(text) for text in texts), message


def test_the_readme_takes_ten_minutes() -> None:
    assert len(TEXT["README.md"].split()) < 2300
